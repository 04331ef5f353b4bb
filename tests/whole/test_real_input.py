"""The main job on real input, shortened: a pretrained model learns real tasks in turn."""

from __future__ import annotations

import pytest

from holdfast import load_config, run
from holdfast.system.files import read_jsonl
from holdfast.system.progress import Progress
from support.paths import ROOT

SHARED = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="the real data (../shared/data) are not here")


@pytest.mark.slow
def test_news_and_reviews_shortened(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = ["data.train_rows=96", "data.test_rows=16", "training.epochs=12", "data.max_length=96"]
    config = load_config("examples/news-and-reviews.yaml", [*changes, f"output={tmp_path}/run"])
    matrix = run(config, Progress(quiet=True))
    assert matrix["tasks"] == ["dbpedia", "amazon", "agnews", "yelp"]
    # Before training it tells stories; after a stage it answers with labels of the task that it has just learned.
    labels = {"very negative", "negative", "neutral", "positive", "very positive"}
    start = read_jsonl(tmp_path / "run" / "stages" / "00-start" / "responses" / "amazon.jsonl")
    after = read_jsonl(tmp_path / "run" / "stages" / "02-amazon" / "responses" / "amazon.jsonl")
    assert not labels & {record["response"] for record in start}
    assert sum(record["response"] in labels for record in after) >= 12
    events = read_jsonl(tmp_path / "run" / "events.jsonl")
    for stage in (1, 2, 3, 4):
        losses = [e["terms"]["task"] for e in events if e["stage"] == stage]
        assert losses[-1] < losses[0]
        assert all(("replay" in e["terms"]) == (stage > 1) for e in events if e["stage"] == stage)
    general = matrix["general"]["perplexity/wiki"]
    assert all(value > 1 for value in general)
