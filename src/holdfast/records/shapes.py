"""What the JSON files of a run hold: whoever reads them gets these shapes, or a message that names file and key.

Checksums tell a damaged file from a whole one where there are any. Directories of version 0.1.0 have none, and a file
that was edited by hand and is no longer what it was is told apart here. All files may have further keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import AfterValidator, Field, with_config
from typing_extensions import TypedDict

from holdfast.errors import RunDirectoryError
from holdfast.records.shift import DRAWN, Drawn, Shift
from holdfast.system import files, manifest
from holdfast.system.shapes import AS_WRITTEN, Count, Facts, Number, of_shape


@with_config(AS_WRITTEN)
class _Named(TypedDict):
    name: str


@with_config(AS_WRITTEN)
class _Training(TypedDict):
    batch_size: NotRequired[Count]
    max_steps: NotRequired[Count | None]
    epochs: NotRequired[float | list[float]]


@with_config(AS_WRITTEN)
class _Evaluation(TypedDict):
    bootstrap: NotRequired[Count]
    split: NotRequired[str]
    general: NotRequired[list[Facts] | None]


@with_config(AS_WRITTEN)
class _Config(TypedDict):
    """Of a run; the laboratory's have other sections."""

    method: NotRequired[list[_Named]]
    model: NotRequired[Facts]
    training: NotRequired[_Training]
    evaluation: NotRequired[_Evaluation]
    stream: NotRequired[Facts]
    data: NotRequired[Any]  # the laboratory has a list
    tuner: NotRequired[_Named | None]


@with_config(AS_WRITTEN)
class _Task(TypedDict):
    train: int
    test: int
    metric: str
    fingerprint: str


@with_config(AS_WRITTEN)
class _Check(TypedDict):
    key: str
    value: NotRequired[Number]
    limit: NotRequired[float | str | None]
    interval: NotRequired[list[Number] | None]
    passed: NotRequired[bool]


@with_config(AS_WRITTEN)
class _Decision(TypedDict):
    stage: int
    task: str
    passed: bool
    action: str
    current: int
    checks: list[_Check]


@with_config(AS_WRITTEN)
class _Rollback(TypedDict):
    after: int
    to: int
    at: str


@with_config(AS_WRITTEN)
class _Rebuilt(TypedDict):
    at: str
    tasks: NotRequired[list[str]]
    rows_of: NotRequired[list[str]]
    undone: NotRequired[list[str]]
    rows: NotRequired[Facts]


@with_config(AS_WRITTEN)
class _Stream(TypedDict):
    name: str
    version: str


@with_config(AS_WRITTEN)
class _Hardware(TypedDict):
    cpu: str
    cores: int
    memory_gib: float
    gpus: list[str]


@with_config(AS_WRITTEN)
class _Change(TypedDict):
    at: str
    versions: NotRequired[list[str]]
    accepted: NotRequired[list[str]]


@with_config(AS_WRITTEN)
class _StageTraining(TypedDict):
    epochs: float | list[float]


@with_config(AS_WRITTEN)
class _StageConfig(TypedDict):
    training: _StageTraining


@with_config(AS_WRITTEN)
class _Stage(TypedDict):
    stage: int
    task: str
    config: _StageConfig
    fingerprint: str
    versions: dict[str, str]
    started: str | None
    finished: str | None


@with_config(AS_WRITTEN)
class _Growth(TypedDict):
    after: int
    tasks: list[str]
    at: str


@with_config(AS_WRITTEN)
class _TokenFile(TypedDict):
    """Of a laboratory run."""

    tokens: int
    fingerprint: str


@with_config(AS_WRITTEN)
class Record(TypedDict):
    """run.json."""

    config: _Config
    seed: int
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[_Hardware | None]
    engine: str
    processes: NotRequired[int]
    commit: NotRequired[str | None]
    started: str
    finished: NotRequired[str | None]
    stream: NotRequired[_Stream]
    tasks: NotRequired[dict[str, _Task]]
    max_length: NotRequired[int]
    model_folder: NotRequired[str | None]
    parameters: NotRequired[Facts | int | None]
    converted_from: NotRequired[str | None]
    seconds: NotRequired[dict[str, float]]
    tokens: NotRequired[int | None]
    peak_memory_gib: NotRequired[Number]
    inputs: NotRequired[dict[str, dict[str, str | None]]]
    files: NotRequired[dict[str, _TokenFile]]
    changes: NotRequired[list[_Change]]
    stages: NotRequired[list[_Stage]]
    steps: NotRequired[list[int]]
    grown: NotRequired[list[_Growth]]
    gate: NotRequired[list[_Decision]]
    rollbacks: NotRequired[list[_Rollback]]
    rebuilt: NotRequired[list[_Rebuilt]]


@with_config(AS_WRITTEN)
class _Curve(TypedDict):
    steps: list[int]
    scores: list[Number]
    area: Number


@with_config(AS_WRITTEN)
class _Summary(TypedDict):
    average: Number
    new_task: Number
    forgetting: Number
    backward_transfer: Number
    forward_transfer: Number
    general_change: Number


def _has_logarithms(general: dict[str, Any]) -> dict[str, Any]:
    """Measures of general ability by their names, of which perplexities are above 0: their logarithms are losses."""
    for name, found in general.items():
        values = found if isinstance(found, list) else [found]
        if name.startswith("perplexity") and any(value is not None and value <= 0 for value in values):
            raise ValueError(f"{name} must be above 0")
    return general


@with_config(AS_WRITTEN)
class _Chance(TypedDict):
    level: float
    questions: int
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    at_chance: bool


@with_config(AS_WRITTEN)
class Matrix(TypedDict):
    """matrix.json."""

    tasks: list[str]
    metrics: dict[str, str]
    scores: list[list[Number]]
    beside: NotRequired[dict[str, dict[str, list[Number]]]]
    floors: NotRequired[dict[str, Number]]
    general: Annotated[dict[str, list[Number]], AfterValidator(_has_logarithms)]
    chance: NotRequired[dict[str, _Chance]]
    joint: list[Number] | None
    summary: _Summary
    by_task: NotRequired[dict[str, list[Number]]]
    curves: NotRequired[dict[str, _Curve]]
    missing: NotRequired[dict[str, str]]
    intervals: dict[str, list[float] | None]


@with_config(AS_WRITTEN)
class _Constraint(TypedDict):
    key: str
    task: str | None
    lost: float
    interval: list[float]
    budget: float
    kept: bool


@with_config(AS_WRITTEN)
class _Budget(TypedDict):
    constraints: list[_Constraint]
    share: float


@with_config(AS_WRITTEN)
class StageRecord(TypedDict):
    """stage.json."""

    stage: int
    task: str
    steps: int
    tokens: int
    seconds: float
    peak_memory_gib: float
    weights: str
    keep: NotRequired[_Budget | None]
    shift: NotRequired[Shift]


@with_config(AS_WRITTEN)
class Evaluation(TypedDict):
    """evaluation.json."""

    general: Annotated[dict[str, Number], AfterValidator(_has_logarithms)]
    general_examples: NotRequired[dict[str, list[list[Number]]]]
    general_chance: NotRequired[dict[str, float]]
    general_responses: NotRequired[dict[str, str]]
    seconds: float
    same_as: NotRequired[int]


@with_config(AS_WRITTEN)
class Event(TypedDict):
    """A line of events.jsonl."""

    stage: int
    step: int
    task: str
    loss: Number
    terms: dict[str, Number]


@with_config(AS_WRITTEN)
class CurvePoint(TypedDict):
    """A line of curves.jsonl."""

    stage: int
    step: int
    scores: NotRequired[dict[str, Number]]


@with_config(AS_WRITTEN)
class Row(TypedDict):
    """A line of a file of responses."""

    row: int
    number: NotRequired[int]
    shown: NotRequired[list[str]]
    prompt: NotRequired[str]
    answer: NotRequired[str]
    answers: NotRequired[list[str]]
    response: NotRequired[str]
    score: Number
    beside: NotRequired[dict[str, Number]]


@with_config(AS_WRITTEN)
class Asked(TypedDict):
    """asked.json."""

    stage: int
    weights: str
    stream: Facts
    endpoint: dict[str, str] | None


@with_config(AS_WRITTEN)
class _Taken(TypedDict):
    name: str
    data: str
    fingerprint: str
    options: Facts
    training: Facts
    given: Facts
    train: int
    test: int


@with_config(AS_WRITTEN)
class _Given(TypedDict):
    model: _Named


@with_config(AS_WRITTEN)
class Learned(TypedDict):
    """learn.json."""

    memory: bool
    given: _Given
    settled: Facts
    own: Facts
    tasks: list[_Taken]


@with_config(AS_WRITTEN)
class HashedRow(TypedDict):
    """A line of data/rows.jsonl."""

    row: str
    prompt: str
    side: Literal["train", "test"]
    task: str


@with_config(AS_WRITTEN)
class Sent(TypedDict):
    """What a tracker has, in trackers.json; ``former``: its runs of the run that this one was made again from."""

    former: NotRequired[list[str]]
    run: NotRequired[str]
    lines: NotRequired[dict[str, list[int]]]
    stages: NotRequired[dict[str, list[int]]]
    report: NotRequired[str]


SHAPES: dict[str, Any] = {
    "run.json": Record,
    "matrix.json": Matrix,
    "stage.json": StageRecord,
    "evaluation.json": Evaluation,
    DRAWN: Drawn,
    "events.jsonl": list[Event],
    "curves.jsonl": list[CurvePoint],
    "responses": list[Row],
    "asked.json": Asked,
    "learn.json": Learned,
    "rows.jsonl": list[HashedRow],
    "trackers.json": dict[str, Sent],
}
"""By a file's name, or by that of its folder."""

SOME_ROWS = {"number", "answers", "input", "beside", "shown"}
"""Keys that some rows of a file have and others do not."""


def read_json(path: Path) -> Any:
    """Read a JSON file of a run, compared with its manifest and of its shape; RunDirectoryError if it is damaged."""
    return _checked(path, path.name, manifest.read_json(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file of a run that was written whole, as :func:`read_json`."""
    rows = manifest.read_jsonl(path)
    if path.name in SHAPES:
        return cast(list[dict[str, Any]], _checked(path, path.name, rows))
    if "responses" in (path.parent.name, path.parent.parent.name):
        _check_alike(path, _checked(path, "responses", rows))
    return rows


def _check_alike(path: Path, rows: list[dict[str, Any]]) -> None:
    """RunDirectoryError if a row lacks a key that other rows have and all must."""
    kinds = dict.fromkeys(map(tuple, rows))  # the keys of a row, mostly the same, by the first row that has them
    everywhere = {key for kind in kinds for key in kind} - SOME_ROWS
    for kind in kinds:
        if lacking := sorted(everywhere.difference(kind)):
            lacks = f"line {1 + list(map(tuple, rows)).index(kind)} lacks {', '.join(lacking)}"
            raise damaged(path, f"{lacks}, which other lines have")


def read_appended(path: Path) -> list[dict[str, Any]]:
    """Read a file of a run that grows by lines, each of its shape; see :func:`holdfast.system.files.read_appended`."""
    return cast(list[dict[str, Any]], _checked(path, path.name, files.read_appended(path)))


def _checked(path: Path, name: str, value: Any) -> Any:
    return checked(path, SHAPES[name], value) if name in SHAPES else value


def checked(path: Path, shape: Any, value: Any) -> Any:
    """The value of a file of a run, which has this shape; RunDirectoryError if it has not."""
    try:
        return of_shape(shape, value)
    except ValueError as error:
        raise damaged(path, str(error)) from None


def damaged(path: Path, why: str) -> RunDirectoryError:
    """The error about a damaged file of a run, with what can be done about it."""
    return RunDirectoryError(f"{path}: is damaged: {why}; {manifest.remedy(path)}")
