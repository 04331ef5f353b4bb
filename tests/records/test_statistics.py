"""What is kept of a stage's test rows in place of their texts: it is what they give, and is used only while it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from holdfast.errors import RunDirectoryError
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.statistics import FILE, Statistics, file_content, maker, of_responses
from holdfast.scoring import find
from holdfast.system.files import jsonl_file, read_jsonl
from holdfast.system.manifest import MANIFEST, file_facts, note, write_noted
from support.synthetic_runs import STAGES, TASKS, make_run

METRICS = ["accuracy", "loss", "macro_f1", "accuracy"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run with statistics of all its stages, and a manifest."""
    run = read_run(make_run(tmp_path / "run", metrics=METRICS))
    for folder in run.folders.values():
        found = {}
        for task, metric in zip(TASKS, METRICS, strict=True):
            file = folder / "responses" / f"{task.replace('/', '_')}.jsonl"
            note(run.path, file, {"": file_facts(file)})
            values = find(metric).statistics(read_jsonl(file))
            found[file.stem] = Statistics(maker(find(metric)), file_facts(file)["sha256"], values)
        write_noted(run.path, folder / FILE, file_content(found))
    return run.path


def same(found: FinishedRun, expected: FinishedRun) -> bool:
    pairs = [(found.statistics(t, j), expected.statistics(t, j)) for t in range(STAGES + 1) for j in range(STAGES)]
    rows = zip(found.examples(STAGES), expected.examples(STAGES), strict=True)
    pairs += [pair for both in rows for pair in zip(*both, strict=True)]
    return all(a is not None and b is not None and a.dtype == b.dtype == float and (a == b).all() for a, b in pairs)


def without(path: Path) -> FinishedRun:
    """The run, read as if it had no manifest, so that nothing but its responses is used."""
    (path / MANIFEST).rename(path / "elsewhere")
    run = read_run(path)
    run.examples(STAGES)
    (path / "elsewhere").rename(path / MANIFEST)
    return run


def test_statistics_are_those_of_the_responses_and_need_no_reading_of_them(path, monkeypatch):
    expected = without(path)
    monkeypatch.setattr(FinishedRun, "responses", lambda *_: pytest.fail("responses were read"))
    assert same(read_run(path), expected)


def test_responses_that_were_written_again_are_read(path):
    file = path / "stages" / f"01-{TASKS[0]}" / "responses" / f"{TASKS[0]}.jsonl"
    rows = [row | {"score": 1.0} for row in read_jsonl(file)]
    write_noted(path, file, jsonl_file(rows))
    found = read_run(path)
    assert (found.statistics(1, 0) == 1).all() and same(found, without(path))


def test_another_scorer_s_statistics_are_not_used(path):
    folder = path / "stages" / f"01-{TASKS[0]}"
    names = [task.replace("/", "_") for task in TASKS]
    made = {name: maker(find(metric)) for name, metric in zip(names, METRICS, strict=True)}
    assert of_responses(folder, path, made).keys() == set(names)
    other = made | {names[0]: maker(find("o_lora_exact_match"))}
    assert of_responses(folder, path, other).keys() == set(names[1:])


def test_a_damaged_file_is_named(path):
    file = path / "stages" / f"01-{TASKS[0]}" / FILE
    (path / MANIFEST).unlink()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RunDirectoryError, match=rf"{FILE}: is damaged: it cannot be read .*; delete it, and the comm"):
        read_run(path).statistics(1, 0)


@pytest.mark.parametrize(("value", "dtype"), [(1.0, "uint8"), (0.5, "float32"), (0.1, "float64"), (np.nan, "float64")])
def test_values_are_kept_exactly_and_small(value, dtype, tmp_path):
    values = np.array([[value, 1.0], [0.0, 255.0]])
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / FILE).write_bytes(file_content({"a": Statistics("s", "0", values)}))
    note(tmp_path, stage / "responses" / "a.jsonl", {"": {"bytes": 0, "sha256": "0"}})
    (found,) = of_responses(stage, tmp_path, {"a": "s"}).values()
    assert found.dtype == dtype and np.array_equal(found, values, equal_nan=True)
