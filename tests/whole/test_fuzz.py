"""Bad input of every kind ends with a message, soon: known cases always, thousands in the slow tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from support import fuzz
from support.paths import GOLDEN
from support.tiny import tiny_config

OLD_RUNS = GOLDEN / "old_runs"
SEED = 17


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("fuzz")) | {"output": "out"}
    return config | {"training": {"epochs": 1, "batch_size": 8, "max_steps": 1}}


def assert_no_faults(cases: Sequence[fuzz.Case], place: Path) -> None:
    faults = []
    for number, case in enumerate(cases):
        folder = place / str(number)
        folder.mkdir()
        if said := fuzz.fault(case, folder):
            faults.append(said)
    assert not faults, f"{len(faults)} of {len(cases)} cases:\n\n" + "\n\n".join(faults[:10])


KEYS = {"seed", "training.learning_rate", "output"}


def test_values_that_no_key_takes(base, tmp_path):
    known = [case for case in fuzz.configuration_cases(base) if case.name.split(": ")[0] in KEYS and case.codes == (2,)]
    assert len(known) == len(KEYS) * len(fuzz.NEVER)
    assert_no_faults(known, tmp_path)


KNOWN_DAMAGES = (
    "run.json a list", "run.json deep", "run.json many digits", "matrix.json null", "matrix.json an object",
    "matrix.json half a surrogate", "events.jsonl noise", "events.jsonl a number", "stage.json null",
    "red.jsonl a list", "evaluation.json an object", "ewc.json an object", "tokenizer_config.json cut",
)  # fmt: skip


def test_damaged_runs(tmp_path):
    cases = fuzz.damaged_run_cases(OLD_RUNS / "full-ewc", SEED, 0)
    known = [case for case in cases if case.name.endswith(KNOWN_DAMAGES)]
    assert len(known) >= len(KNOWN_DAMAGES)
    assert_no_faults(random.Random(SEED).sample(known, 20), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_values_in_configurations(part, base, tmp_path):
    chance = random.Random(f"{SEED} {part}")
    assert_no_faults(chance.sample(fuzz.configuration_cases(base), 200), tmp_path)


@pytest.mark.slow
def test_values_on_the_command_line(base, tmp_path):
    assert_no_faults(random.Random(SEED).sample(fuzz.override_cases(base), 300), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full-ewc", "lora-replay"])
def test_many_damaged_runs(name, tmp_path):
    assert_no_faults(random.Random(SEED).sample(fuzz.damaged_run_cases(OLD_RUNS / name, SEED, 25), 200), tmp_path)


@pytest.mark.slow
def test_broken_models(base, tmp_path):
    cases = fuzz.broken_model_cases(Path(base["model"]), base, SEED, 25)
    assert_no_faults(random.Random(SEED).sample(cases, 100), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_damaged_data(part, base, tmp_path):
    cases = fuzz.data_cases(base, SEED, 40)
    assert_no_faults(random.Random(f"{SEED} {part}").sample(cases, 150), tmp_path)


@pytest.mark.slow
def test_wrong_command_lines(base, tmp_path):
    assert_no_faults(fuzz.command_line_cases(OLD_RUNS / "full-ewc", base, SEED, 300), tmp_path)
