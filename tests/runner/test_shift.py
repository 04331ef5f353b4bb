"""How far a stage moves the model: an estimate of KL(before ‖ after) on its prompts, the same after a kill."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

from holdfast import run
from holdfast.config.run import load_config
from holdfast.data.encode import Encoder
from holdfast.data.streams.chronicle.stream import chronicle
from holdfast.records.read import read_run, read_runs
from holdfast.report.compare import compare
from holdfast.report.page import write_report
from holdfast.runner import shift
from holdfast.runner.plan import PlannedStage
from holdfast.runner.setup import prepare, resolve
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from support.resumed import finish, start
from support.tiny import tiny_config, tiny_model, tiny_tokenizer

QUIET = Progress(quiet=True)


def configured(folder):
    """A run of the tiny model that measures the shift as runs do by themselves."""
    config = tiny_config(folder)
    del config["evaluation"]["shift"]
    return config


def shifts(path):
    return [read_json(file).get("shift") for file in sorted(path.glob("stages/*/stage.json"))]


def divergence(before, after, prompt, length, stops):
    """KL of the distributions over responses, summed over all of them, and their mean length under ``before``."""
    kl, tokens = 0.0, 0.0
    kinds = before.config.vocab_size

    def log_probs(model, ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    def walk(drawn, chance):
        nonlocal kl, tokens
        p, q = (log_probs(model, [*prompt, *drawn]) for model in (before, after))
        kl += chance * float((p.exp() * (p - q)).sum())
        tokens += chance
        if len(drawn) + 1 < length:
            for token in range(kinds):
                if token not in stops:
                    walk([*drawn, token], chance * float(p[token].exp()))

    walk([], 1.0)
    return kl, tokens


def test_it_estimates_the_divergence_over_all_responses(tmp_path, monkeypatch):
    """Of two models with a vocabulary of five, whose responses of up to three tokens can all be listed."""
    sizes = {"vocab_size": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    before, after = (tiny_model(seed, **sizes) for seed in (0, 1))
    for model in (before, after):  # tiny random models hardly differ
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4)
    config = tiny_config(tmp_path)
    config["evaluation"] |= {"shift": 4000, "batch_size": 4000}
    setup = prepare(resolve(load_config(config)))
    monkeypatch.setattr(shift, "LENGTH", 3)
    prompts = [[1, 3, 4], [1, 4]]
    asked = iter(prompts * 2000)
    monkeypatch.setattr(type(setup.encoder), "prompt", lambda *_, **__: next(asked))
    monkeypatch.setattr(type(setup.encoder), "stop_ids", [2])
    [task] = [task for task in setup.stream.tasks if task.name == "red"]
    task.test[:] = (task.test * 4000)[:4000]
    drawn = shift.draw(setup, PlannedStage(1, "red", (task,), 1), before, Progress(quiet=True))
    found = shift.measure(setup, drawn, after)
    exact = [divergence(before, after, prompt, 3, [2]) for prompt in prompts]
    expected = sum(kl for kl, _ in exact) / sum(tokens for _, tokens in exact)
    assert found["responses"] == 4000
    low, high = found["interval"]
    assert low < expected < high and high - low < 0.5 * expected
    assert math.isclose(found["nats"], expected, rel_tol=0.2)


def test_a_prompt_that_leaves_less_room_has_a_shorter_response():
    """As one whose measured answers are short, of which half of the longest sequence is more than it can give."""
    tokenizer, question = tiny_tokenizer(), chronicle(size=4, seed=0).tasks[0].test[0]
    whole = Encoder(tokenizer, max_length=512).prompt(question, reserve=1)
    encoder = Encoder(tokenizer, max_length=len(whole) + 5)
    assert shift._prompt(encoder, question, 32) == (whole, 5) and shift._prompt(encoder, question, 4) == (whole, 4)


def test_a_run_has_it_for_each_stage_and_shows_it(tmp_path):
    config = configured(tmp_path)
    for name, rate in (("slow", 1e-4), ("fast", 3e-2)):
        config |= {"output": str(tmp_path / name)}
        config["training"] |= {"learning_rate": rate}
        run(config, QUIET)
        found = shifts(tmp_path / name)
        assert len(found) == 3 and all(one["responses"] == 8 and one["tokens"] >= 8 for one in found)
        assert not list((tmp_path / name).rglob("drawn.json"))
    slow, fast = read_runs([tmp_path / "slow", tmp_path / "fast"])
    assert 0 <= abs(slow.shift) < fast.shift
    assert [row["shift"] for row in compare([slow, fast]).rows] == [slow.shift, fast.shift]
    page = write_report([tmp_path / "slow", tmp_path / "fast"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Forgetting against the shift" in page and "shift, nats a token" in page


def test_a_stage_without_prompts_or_with_none_wanted_has_none(tmp_path):
    config = configured(tmp_path)
    config["evaluation"] |= {"shift": 0}
    run(config, QUIET)
    assert shifts(tmp_path / "run") == [None] * 3 and read_run(tmp_path / "run").shift is None


@pytest.mark.parametrize("texts", ["texts", pytest.param("scores", marks=pytest.mark.slow)])
def test_a_killed_run_compares_with_the_same_responses(tmp_path, texts):
    config = configured(tmp_path)
    config["evaluation"] |= {"responses": texts}
    config["training"] |= {"save_every": 2}
    run(config | {"output": str(tmp_path / "whole")}, QUIET)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"output": str(tmp_path / "killed")}))
    assert finish(start(file, "step", 3)) == -signal.SIGKILL
    assert bool(list((tmp_path / "killed").rglob("drawn.json"))) == (texts == "texts")
    assert finish(start(file)) == 0
    whole, killed = shifts(tmp_path / "whole"), shifts(tmp_path / "killed")
    assert killed[1:] == whole[1:] and killed[0] == (whole[0] if texts == "texts" else None)
