"""Runs read from their directories, and labels that tell several of them apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from holdfast.api.scorer import Scorer
from holdfast.config.describe import flat
from holdfast.errors import RunDirectoryError
from holdfast.metrics.intervals import rise_intervals
from holdfast.metrics.matrix import Total
from holdfast.records.directory import current_stage, file_name
from holdfast.records.former import with_former_defaults
from holdfast.records.growth import stage_settings
from holdfast.records.shapes import damaged, read_appended, read_json, read_jsonl
from holdfast.records.shift import Shift
from holdfast.records.statistics import maker, of_responses
from holdfast.records.together import check_matrix
from holdfast.scoring.score import scorer

REFERENCES = {"joint": "reference: all tasks at once", "frozen": "reference: no training"}


@dataclass
class FinishedRun:
    """A run read from its directory, finished or not.

    Attributes:
        info: the content of run.json.
        matrix: the content of matrix.json.
        label: a name that differs from those of the other runs in a report.
    """

    path: Path
    info: dict[str, Any]
    matrix: dict[str, Any]
    label: str = ""
    _statistics: dict[tuple[int, int], NDArray[np.float64] | None] = field(default_factory=dict, repr=False)
    _kept: dict[int, dict[str, NDArray[Any]]] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]

    @property
    def tasks(self) -> list[str]:
        return self.matrix["tasks"]

    @property
    def scores(self) -> list[list[float | None]]:
        """S, [T+1][T]; row 0 is before training; None where not measured."""
        return self.matrix["scores"]

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl, in the order of training."""
        return _read_events(self.path / "events.jsonl")

    @property
    def method(self) -> str:
        """The names of the methods."""
        return " + ".join(method["name"] for method in self.config["method"])

    @property
    def max_length(self) -> int:
        """Tokens of a sequence; RunDirectoryError where run.json does not say."""
        if "max_length" not in self.info:
            raise RunDirectoryError(
                f"{self.path / 'run.json'}: is damaged: max_length is missing; restore it from a copy"
            )
        length: int = self.info["max_length"]
        return length

    @property
    def reference(self) -> str | None:
        """What this run is a reference for; None: it is a method to be compared."""
        return REFERENCES.get(self.config["method"][0]["name"])

    @property
    def joint(self) -> bool:
        """Whether one stage learned all tasks; its scores are the last row of the score matrix."""
        return self.config["method"][0]["name"] == "joint"

    @property
    def split(self) -> str:
        """The split that the tasks are measured on: test, or dev."""
        return self.config["evaluation"].get("split", "test")

    @property
    def finished(self) -> bool:
        return self.info.get("finished") is not None

    @property
    def untrained(self) -> bool:
        """Whether the method trains nothing."""
        return self.finished and not self._trains

    @cached_property
    def _trains(self) -> bool:
        """Whether the training of a stage began, told by what stays where the stages' folders were deleted."""
        if any(self.folders) or self.info.get("stages"):
            return True
        return "stages" not in self.info and bool(self.events)  # a run of 0.1.0 notes no stages

    @property
    def minutes(self) -> float | None:
        """Minutes of training and evaluation; None before the run is finished."""
        seconds = self.info.get("seconds")
        return sum(seconds.values()) / 60 if seconds else None

    @cached_property
    def shifts(self) -> dict[int, Shift | None]:
        """How far each trained stage moved the model on its own prompts, by number; None where none was measured."""
        files = {number: folder / "stage.json" for number, folder in sorted(self.folders.items())}
        return {number: read_json(file).get("shift") for number, file in files.items() if file.exists()}

    @property
    def shift(self) -> float | None:
        """The mean of :attr:`shifts`, nats a token; None where a stage lacks it, or there is none."""
        nats = [found["nats"] if found else None for found in self.shifts.values()]
        known = [value for value in nats if value is not None]
        return sum(known) / len(known) if known and len(known) == len(nats) else None

    @cached_property
    def stage_settings(self) -> list[dict[str, Any]]:
        """The settings of training of each stage that began, by dotted keys; of a run in which none did, its own."""
        return stage_settings(self.path, self.info) or [flat({"training": self.config["training"]})]

    def setting(self, key: str) -> Any:
        """A setting of training, by its dotted key; the list of its values by stage, where these differ."""
        values = [settings.get(key) for settings in self.stage_settings]
        return values[0] if all(value == values[0] for value in values) else values

    def figure(self, key: str) -> float | None:
        """A figure of matrix.json or a cost of run.json, by its key; None if it is not known."""
        if key in ("minutes", "shift"):
            return cast(float | None, getattr(self, key))
        if key in self.matrix["summary"]:
            return self.matrix["summary"][key]
        return self.matrix.get(key, self.info.get(key))

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The scorer of each task, which gives the task's score from rows that are scored."""
        return {task: scorer(self.matrix["metrics"][task]) for task in self.tasks}

    def lower_is_better(self, j: int) -> bool:
        """Whether a lower score of task j is better, as with a loss."""
        return self.scorers[self.tasks[j]].lower_is_better

    def own_stage(self, j: int) -> int:
        """The stage in which task j (from 0) was learned: j + 1, or in joint training the last one."""
        return len(self.tasks) if self.joint else j + 1

    def stage_names(self) -> list[str]:
        """T+1 names of the rows of the score matrix."""
        if self.joint:
            between = [f"stage {t}" for t in range(1, len(self.tasks))]
            return ["before training", *between, "after all tasks"]
        return ["before training", *(f"after {task}" for task in self.tasks)]

    def seen_average(self) -> list[float | None]:
        """The mean score after each stage over the tasks learned by then, [T]; None if one of them was not measured."""
        own = [self.own_stage(j) for j in range(len(self.tasks))]
        means: list[float | None] = []
        for t, row in enumerate(self.scores[1:], start=1):
            seen = [score for score, stage in zip(row, own, strict=True) if stage <= t]
            scores = [score for score in seen if score is not None]
            means.append(sum(scores) / len(scores) if scores and len(scores) == len(seen) else None)
        return means

    @cached_property
    def gains(self) -> list[tuple[float | None, list[float] | None]]:
        """What each task gained in its own stage, positive is better, and its 95 % interval over test examples.

        Either is None where the scores or the answers that it needs are missing.
        """
        gains: list[tuple[float | None, list[float] | None]] = []
        pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]] | None] = []
        signs = [-1 if self.lower_is_better(j) else 1 for j in range(len(self.tasks))]
        for j, sign in enumerate(signs):
            before, after = 0 if self.joint else self.own_stage(j) - 1, self.own_stage(j)
            first, second = self.scores[before][j], self.scores[after][j]
            earlier, later = self.statistics(before, j), self.statistics(after, j)
            known = earlier is not None and later is not None and earlier.shape == later.shape
            pairs.append((earlier, later) if known else None)  # type: ignore[arg-type]
            gains.append((None if first is None or second is None else sign * (second - first), None))
        intervals = rise_intervals(pairs, self.totals)
        return [
            (gain, ends and sorted(sign * end for end in ends))
            for (gain, _), ends, sign in zip(gains, intervals, signs, strict=True)
        ]

    @cached_property
    def learned(self) -> dict[str, bool]:
        """By task, whether its own stage raised its score by more than the interval over test examples.

        Tasks that were not measured before and after their stage are left out, and so are all of a run that trains
        nothing. Where the answers were not kept, any rise counts; where there is a single test row, none does.
        """
        gains = {} if self.untrained else dict(zip(self.tasks, self.gains, strict=True))
        return {
            task: task not in self.one_row and (ends[0] if ends else gain) > 0
            for task, (gain, ends) in gains.items()
            if gain is not None
        }

    @cached_property
    def one_row(self) -> list[str]:
        """The tasks of a single test row, of which a rise says nothing."""
        return [task for task in self.tasks if self.info["tasks"][task]["test"] == 1]

    @property
    def not_learned(self) -> list[str]:
        """The tasks of which forgetting says nothing, since their own stage did not raise their score."""
        return [task for task, learned in self.learned.items() if not learned]

    @cached_property
    def folders(self) -> dict[int, Path]:
        """The stages' folders by number; 0 is before training."""
        folders = sorted(self.path.glob("stages/[0-9]*-*"))
        numbers = [folder.name.partition("-")[0] for folder in folders]
        return {int(n): folder for n, folder in zip(numbers, folders, strict=True) if n.isdecimal() and len(n) < 10}

    def stage_of(self, row: int) -> int:
        """The stage whose weights a row of the score matrix belongs to; 0 is the model before training."""
        return self._held[min(row, 1) if self.joint else row] if self._trains else 0

    @cached_property
    def _held(self) -> list[int]:
        """The stage whose weights the run held after each stage, [T+1]."""
        return [current_stage(self.info, stage) for stage in range(len(self.tasks) + 1)]

    def responses(self, row: int, task: str) -> list[dict[str, Any]]:
        """The scored test rows of a task at a row of the score matrix; empty if their file is not there.

        Raises:
            RunDirectoryError: they are not as many as the task has.
        """
        if self.stage_of(row) not in self.folders:
            return []
        file = self.folders[self.stage_of(row)] / "responses" / f"{self._files[task]}.jsonl"
        if not file.exists():
            return []
        rows, expected = read_jsonl(file), self.info["tasks"][task]["test"]
        if len(rows) != expected:
            raise damaged(file, f"it has {len(rows)} rows, and the task {expected}")
        return rows

    def statistics(self, row: int, j: int) -> NDArray[np.float64] | None:
        """Statistics of task j's test examples at a row of the score matrix, [examples, k], from whose sums
        :mod:`holdfast.metrics` computes intervals; None if they were not measured or their file is not there."""
        if self.scores[row][j] is None:
            return None
        place = self.stage_of(row), j  # several rows may belong to one stage
        task = self.tasks[j]
        if (kept := self._kept_statistics(place[0]).get(self._files[task])) is not None:
            return kept.astype(float)
        if place not in self._statistics:
            rows = self.responses(row, task)
            self._statistics[place] = self.scorers[task].statistics(rows) if rows else None
        return self._statistics[place]

    def examples(self, last: int) -> list[list[NDArray[np.float64] | None]]:
        """:meth:`statistics` of every task at every row of the score matrix up to the last, [row][task]."""
        names = [self._files[task] for task in self.tasks]
        found = []
        for t in range(last + 1):
            kept = self._kept_statistics(self.stage_of(t))
            found.append(
                [
                    kept[name].astype(float) if score is not None and name in kept else self.statistics(t, j)
                    for j, (name, score) in enumerate(zip(names, self.scores[t], strict=True))
                ]
            )
        return found

    def _kept_statistics(self, stage: int) -> Mapping[str, NDArray[Any]]:
        """Those of a stage that its file of statistics has, by the name of the file of responses."""
        if stage not in self._kept:
            scorers, rows = self._expected
            folder = self.folders.get(stage)
            found = {} if folder is None else of_responses(folder, self.path, scorers)
            self._kept[stage] = {name: values for name, values in found.items() if len(values) == rows[name]}
        return self._kept[stage]

    @cached_property
    def _expected(self) -> tuple[dict[str, str], dict[str, int]]:
        """What makes the statistics of each file of responses, and how many rows it has, by its name."""
        files = self._files.items()
        scorers = {file: maker(self.scorers[task]) for task, file in files}
        return scorers, {file: self.info["tasks"][task]["test"] for task, file in files}

    @cached_property
    def _files(self) -> dict[str, str]:
        """By task the name of its files of responses, without their ending."""
        return {task: file_name(task, self.tasks) for task in self.tasks}

    def general_statistics(self, row: int, name: str) -> NDArray[np.float64] | None:
        """The same of a measure of general ability, by its name in matrix.json, [examples, 2]."""
        path = self.folders.get(self.stage_of(row), self.path) / "evaluation.json"
        examples = read_json(path).get("general_examples", {}) if path.exists() else {}
        return np.array(examples[name], dtype=float) if name in examples else None

    def general_responses(self, row: int, name: str) -> list[dict[str, Any]]:
        """The answers to a measure of general ability, by its name in matrix.json, at a row of the score matrix; empty
        if they were not kept, as those of texts, of lm-evaluation-harness and of runs before 0.2.

        Raises:
            RunDirectoryError: they are not as many as were asked.
        """
        folder = self.folders.get(self.stage_of(row), self.path)
        evaluated = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else {}
        file = folder / "responses" / "general" / Path(evaluated.get("general_responses", {}).get(name, "")).name
        if not file.is_file():
            return []
        rows, expected = read_jsonl(file), len(evaluated.get("general_examples", {}).get(name, []))
        if len(rows) != expected:
            raise damaged(file, f"it has {len(rows)} rows, and {name} {expected} questions")
        return rows

    @property
    def totals(self) -> list[Total]:
        """For each task the function from the sums of its statistics to its score."""
        return [self.scorers[task].total for task in self.tasks]


def read_run(path: Path) -> FinishedRun:
    """Read one run's directory.

    Raises:
        RunDirectoryError: it holds no run, or a run without scores.
    """
    for name, lacks in (("run.json", "is not a run's directory"), ("matrix.json", "has no scores yet")):
        if not (path / name).is_file():
            raise RunDirectoryError(f"{path}: {lacks}: there is no {name}; give a directory that `holdfast run` wrote")
    record, matrix = with_former_defaults(read_json(path / "run.json")), read_json(path / "matrix.json")
    check_matrix(path, record, matrix)
    return FinishedRun(path, record, matrix)


def read_runs(paths: list[Path]) -> list[FinishedRun]:
    """Read several runs, and give each a label that no other has."""
    runs = [read_run(path) for path in paths]
    for run, label in zip(runs, name_runs(runs), strict=True):
        run.label = label
    return runs


def name_runs(runs: list[FinishedRun], ignored: Collection[str] = ()) -> list[str]:
    """A name for each run that no other has: its method, then up to two settings that differ, then its directory.

    Args:
        ignored: keys of the configuration that do not enter a name.
    """
    names = [run.method for run in runs]
    for places in _same(names):
        config = [settings(runs[i]) for i in places]
        keys = dict.fromkeys(key for values in config for key in values if key not in ignored)
        differing = [key for key in keys if len({json.dumps(values.get(key)) for values in config}) > 1]
        for i, values in zip(places, config, strict=True):
            parts = [f"{key.rpartition('.')[2]} {values.get(key, 'default')}" for key in differing[:2]]
            names[i] = ", ".join([names[i], *parts])
    for directory in (lambda path: path.resolve().name, lambda path: str(path.resolve())):
        for places in _same(names):
            for i in places:
                names[i] = f"{runs[i].method}, {directory(runs[i].path)}"
    return names


def _same(names: list[str]) -> list[list[int]]:
    """The places of each name that stands more than once."""
    counts = Counter(names)
    return [[i for i, name in enumerate(names) if name == one] for one, count in counts.items() if count > 1]


def settings(run: FinishedRun) -> dict[str, Any]:
    """The configuration as dotted keys, each method under its name, without the output."""
    config = {key: value for key, value in run.config.items() if key not in ("output", "method")}
    return flat({method["name"]: method for method in run.config["method"]} | config)


def _read_events(path: Path) -> list[dict[str, Any]]:
    """The logged steps in order; a step that was logged twice, after a resume, counts as it was logged last."""
    events = {(event["stage"], event["step"]): event for event in read_appended(path)}
    return [events[key] for key in sorted(events)]
