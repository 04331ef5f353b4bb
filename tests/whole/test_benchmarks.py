"""The benchmarks run: those of a processor, and that of GPUs where there is none. One table is checked by hand."""

import runpy
import subprocess
import sys

import pytest

from support.paths import ROOT


@pytest.mark.slow
def test_the_script_for_gpus_checks_and_prints_a_line_a_side():
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--shapes", "tiny", "--rounds", "1", "--steps", "2"]
    said = subprocess.run(script, capture_output=True, text=True, check=True, timeout=600).stdout
    assert "FAILED" not in said
    sides = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ") and "/s" not in line]
    for side in ("Trainer", "TRL", "sequential", "replay", "kl", "gere"):
        assert sides.count(side) == 2, said


@pytest.mark.slow
def test_every_benchmark_runs_and_gives_ratios():
    command = [sys.executable, str(ROOT / "benchmarks"), "--quick"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout
    *_, table = said.split("| benchmark | of | what | ratio |")
    for name in ("methods", "tree_lora", "losses", "evaluation", "sampling", "lab", "memory"):
        assert f"\n| {name} | " in table, name


def test_ratios_are_read_from_tables_between_whose_lines_a_trainer_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ratios = runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"), run_name="benchmarks")["ratios"]
    said = "| method | side | ms | time / plain |\n|---|---|---|---|\n{'loss': 1.0}\n\n"
    said += "| a | ours | 12 | 0.50 (0.4..0.6) |\n"
    said += "| of | x | y |\n|---|---|---|\n| b | 1 | 2 |\n"
    assert list(ratios(said)) == [("a, ours", "time / plain", "0.50 (0.4..0.6)")]


def test_the_laboratory_is_compared_with_the_published_code_round_by_round(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = runpy.run_path(str(ROOT / "benchmarks" / "lab.py"), run_name="lab")["table"]
    ours = {"plain Trainer": [2.0, 2.0], "pretrain": [1.0, 2.0]}
    theirs = {"plain Trainer": [4.0, 6.0], "pretrain": [4.0, 6.0]}
    assert table(ours, theirs)[-1] == "| pretrain | 2,731 | 0.75 | 819 | 3.50 (3.00..4.00) |"
    assert table(ours, {})[-1] == "| pretrain | 2,731 | 0.75 |"
