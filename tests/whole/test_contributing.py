"""The method that CONTRIBUTING.md shows is short, and runs as it stands."""

from __future__ import annotations

import re

from holdfast import run
from holdfast.system.files import read_jsonl
from holdfast.system.progress import Progress
from support.paths import ROOT
from support.tiny import tiny_config


def test_the_method_in_contributing_runs(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) < 40
    (tmp_path / "l2_sp.py").write_text(code)
    config = tiny_config(tmp_path, method={"name": str(tmp_path / "l2_sp.py"), "strength": 0.1})
    config["stream"]["order"] = ["red"]
    matrix = run(config, Progress(quiet=True))
    terms = [event["terms"]["l2_sp"] for event in read_jsonl(tmp_path / "run" / "events.jsonl")]
    assert terms[0] == 0 and terms[-1] > 0
    assert len(matrix["scores"]) == 2
