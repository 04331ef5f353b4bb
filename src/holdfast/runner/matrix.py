"""What matrix.json holds, computed from the responses in the stages' folders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from holdfast.api.scorer import Scorer
from holdfast.api.task import Task
from holdfast.evaluation.general import matrix_name
from holdfast.metrics.chance import Chance, against_chance
from holdfast.metrics.intervals import intervals
from holdfast.metrics.summary import area_under_curve, by_task, clipped_backward_transfer, summarize
from holdfast.records.directory import RunDirectory, current_stage
from holdfast.records.read import FinishedRun
from holdfast.records.shapes import damaged, read_appended, read_json, read_jsonl
from holdfast.records.statistics import FILE, Statistics, file_content, maker
from holdfast.runner.measure import responses_file
from holdfast.runner.missing import why_missing
from holdfast.runner.plan import START, PlannedStage
from holdfast.runner.setup import Setup
from holdfast.scoring.score import beside_score, task_score
from holdfast.system.files import finite
from holdfast.system.manifest import checksums, file_facts, write_noted

Column = list[float | None]
"""One value a row of the score matrix, [T+1]; None where not measured."""


@dataclass(frozen=True)
class Outline:
    """What the results of a run are of; its data are not needed.

    Attributes:
        tasks: of which the name and the metrics are read.
        scorers: of the tasks' metrics, by name.
        general: the names of the measures of general ability in matrix.json.
        stages: in order, without the start.
        bootstrap: resamples of the intervals; 0: there are none.
        joint: whether one stage learns all tasks.
        when: ``evaluation.when``, which may leave scores out.
    """

    tasks: list[Task]
    scorers: dict[str, Scorer]
    general: list[str]
    stages: list[PlannedStage]
    bootstrap: int
    joint: bool
    when: str = "all"

    @classmethod
    def of(cls, setup: Setup) -> Outline:
        """That of a run at work."""
        return cls(
            tasks=setup.stream.tasks,
            scorers=setup.scorers,
            general=[matrix_name(one) for one in setup.general],
            stages=setup.stages,
            bootstrap=setup.config.evaluation.bootstrap,
            joint=setup.methods[0].schedule == "joint",
            when=setup.config.evaluation.when,
        )

    @classmethod
    def recorded(cls, run: FinishedRun) -> Outline:
        """That of a run as its directory tells it, which trains."""
        metrics, beside = run.matrix["metrics"], run.matrix.get("beside", {})
        tasks = [Task(name, metrics[name], [], [], beside=list(beside.get(name, {}))) for name in run.tasks]
        stages = [PlannedStage(t, task.name, (task,), t) for t, task in enumerate(tasks, start=1)]
        if run.joint:
            stages = [PlannedStage(1, "joint", tuple(tasks), len(tasks))]
        return cls(
            tasks=tasks,
            scorers={metrics[name]: scorer for name, scorer in run.scorers.items()},
            general=list(run.matrix["general"]),
            stages=stages,
            bootstrap=run.config["evaluation"]["bootstrap"],
            joint=run.joint,
            when=run.config["evaluation"].get("when", "all"),
        )


@dataclass(frozen=True)
class Measured:
    """What the results need of the responses to one task after one stage.

    Attributes:
        rows: how many there are.
        score: by the task's metric.
        beside: by its further metrics.
        statistics: [rows, k], of its metric, with the checksum of the responses.
    """

    rows: int
    score: float
    beside: dict[str, float]
    statistics: Statistics

    @classmethod
    def of(cls, path: Path, task: Task, scorer: Scorer) -> Measured:
        """Read a file of responses."""
        records = read_jsonl(path)
        if not records:
            raise damaged(path, "it must have one row at least")
        return cls(
            rows=len(records),
            score=task_score(records, task.metric),
            beside={name: beside_score(records, name) for name in task.beside},
            statistics=Statistics(maker(scorer), file_facts(path)["sha256"], scorer.statistics(records)),
        )


class MeasuredFiles:
    """The files of responses that a run at work has read; one is read again only after it was written again.

    Attributes:
        kept: by the folder of a stage, the files whose statistics were written there.
    """

    def __init__(self) -> None:
        self.kept: dict[Path, dict[str, Statistics]] = {}
        self._known: dict[Path, tuple[tuple[int, int, int], Measured]] = {}

    def read(self, path: Path, task: Task, scorer: Scorer) -> Measured:
        """That of a file."""
        stat = path.stat()
        written = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if path not in self._known or self._known[path][0] != written:
            self._known[path] = (written, Measured.of(path, task, scorer))
        return self._known[path][1]


def write_matrix(outline: Outline, directory: RunDirectory, files: MeasuredFiles | None = None) -> dict[str, Any]:
    """Write matrix.json and the stages' statistics; all ranks call this.

    Args:
        files: what was read before, and gets what is read now.

    Returns:
        what matrix.json holds; numbers that are not finite are None.
    """
    results = Results(outline, directory, files or MeasuredFiles())
    results.keep_statistics()
    matrix = cast(dict[str, Any], finite(results.matrix()))
    directory.write_json(directory.path / "matrix.json", matrix)
    return matrix


class Results:
    """The results of a run so far; each key of matrix.json is a method or an attribute of that name.

    Row t of the score matrix belongs to the model that the run holds after stage t, and row 0 to the model before
    training. Where the run or its gate went back, that is the model of an earlier stage. Where nothing is trained, all
    rows are the first one.
    """

    def __init__(self, outline: Outline, directory: RunDirectory, files: MeasuredFiles):
        self.outline, self.directory, self._files = outline, directory, files
        self._tasks = outline.tasks
        self._scorers = [outline.scorers[task.metric] for task in self._tasks]
        self._statistics: dict[Path, dict[str, Statistics]] = {}
        self._cells: list[list[Measured | None]] = [[None] * len(self._tasks) for _ in range(len(self._tasks) + 1)]
        self.general: dict[str, Column] = {name: [None] * len(self._cells) for name in outline.general}
        for stage in (START, *outline.stages):
            self._read(stage)
        if not outline.stages:
            self._cells = [self._cells[0]] * len(self._cells)
            self.general = {name: values[:1] * len(values) for name, values in self.general.items()}

    def keep_statistics(self) -> None:
        """Write the statistics of each stage whose responses are others than before; rank 0 does.

        Responses that the manifest does not know, as those of version 0.1.0, have none: nobody could tell later whether
        they are still the same.
        """
        for folder, found in self._statistics.items() if self.directory.process.main else ():
            below = (folder / "responses").relative_to(self.directory.path).as_posix()
            known = checksums(self.directory.path, [f"{below}/{name}.jsonl" for name in found])
            noted = {name: found[name] for name, sha256 in zip(found, known, strict=True) if sha256}
            if noted and self._files.kept.get(folder) != noted:
                write_noted(self.directory.path, folder / FILE, file_content(noted))
                self._files.kept[folder] = noted

    def matrix(self) -> dict[str, Any]:
        """All of it."""
        return {
            "tasks": [task.name for task in self._tasks],
            "metrics": {task.name: task.metric for task in self._tasks},
            "scores": self.scores,
            "beside": self.beside(),
            "floors": self.floors(),
            "general": self.general,
            "chance": self.chance(),
            "joint": self.joint(),
            "summary": self.summary,
            "clipped_backward_transfer": self.clipped,
            "missing": self.missing(),
            "by_task": by_task(self.scores, metrics=self._scorers),
            "curves": self.curves(),
            "intervals": self.intervals(),
        }

    @cached_property
    def scores(self) -> list[Column]:
        """S, [T+1][T]."""
        return [[None if cell is None else cell.score for cell in row] for row in self._cells]

    @cached_property
    def summary(self) -> dict[str, float | None]:
        return summarize(self.scores, metrics=self._scorers, general=self.general)

    @cached_property
    def clipped(self) -> float | None:
        return clipped_backward_transfer(self.scores, metrics=self._scorers)

    def missing(self) -> dict[str, str]:
        """Why each figure that is null is so."""
        return why_missing(
            self.scores,
            self.summary | {"clipped_backward_transfer": self.clipped},
            tasks=[task.name for task in self._tasks],
            metrics=self._scorers,
            general=self.general,
            joint=self.outline.joint,
            when=self.outline.when,
        )

    def beside(self) -> dict[str, dict[str, Column]]:
        """The further metrics of each task that has any."""
        return {
            task.name: {name: [None if cell is None else cell.beside[name] for cell in column] for name in task.beside}
            for task, column in zip(self._tasks, zip(*self._cells, strict=True), strict=True)
            if task.beside
        }

    def floors(self) -> dict[str, float | None]:
        """The score before training of each task whose metric gives unrelated texts well more than 0."""
        return {
            task.name: score
            for task, scorer, score in zip(self._tasks, self._scorers, self.scores[0], strict=True)
            if scorer.floor
        }

    def chance(self) -> dict[str, Chance]:
        """How the answers before training compare with guesses, of each general ability with choices."""
        path = self.directory.stage(START.index, START.name) / "evaluation.json"
        measured = read_json(path) if path.exists() else {}
        examples = measured.get("general_examples", {})
        return {
            name: against_chance(sum(right == 1 for right, _ in examples[name]), len(examples[name]), level)
            for name, level in measured.get("general_chance", {}).items()
            if examples.get(name)
        }

    def joint(self) -> Column | None:
        """The scores after joint training; None for any other method."""
        return self.scores[-1] if self.outline.joint else None

    def intervals(self) -> dict[str, list[float] | None]:
        """95 % intervals of the summary over test examples; empty where the configuration turns them off."""
        resamples = self.outline.bootstrap
        if not resamples:
            return {}
        statistics = [[None if cell is None else cell.statistics.values for cell in row] for row in self._cells]
        totals = [scorer.total for scorer in self._scorers]
        return intervals(statistics, metrics=self._scorers, totals=totals, resamples=resamples)

    def curves(self) -> dict[str, dict[str, Any]]:
        """The learning curve of each task that was measured while its stage trained."""
        lines = [line for line in read_appended(self.directory.path / "curves.jsonl") if "scores" in line]
        curves = {}
        for stage in self.outline.stages:
            measured = [line for line in lines if line["stage"] == stage.index]
            folder = self.directory.stage(stage.index, stage.name)
            if measured and (folder / "evaluation.json").exists():
                for task in stage.tasks:
                    curves[task.name] = self._curve(stage, task, folder, measured)
        return curves

    def _curve(self, stage: PlannedStage, task: Task, folder: Path, measured: list[dict[str, Any]]) -> dict[str, Any]:
        """Steps, scores and the area under them, from the model that the stage began with to the one that it made."""
        last = read_json(folder / "stage.json")["steps"]
        before = self.scores[stage.index - 1][[other.name for other in self._tasks].index(task.name)]
        after = self._measured(self._responses(folder, task), task).score
        if any(task.name not in line["scores"] for line in measured):
            raise damaged(self.directory.path / "curves.jsonl", f"a line of stage {stage.index} lacks {task.name!r}")
        between = [(line["step"], line["scores"][task.name]) for line in measured if line["step"] < last]
        steps, scores = [list(column) for column in zip((0, before), *between, (last, after), strict=True)]
        return {"steps": steps, "scores": scores, "area": area_under_curve(steps, scores)}

    def _measured(self, path: Path, task: Task) -> Measured:
        return self._files.read(path, task, self.outline.scorers[task.metric])

    def _responses(self, folder: Path, task: Task) -> Path:
        return responses_file(folder, task.name, [other.name for other in self._tasks])

    def _read(self, stage: PlannedStage) -> None:
        """Read the row of a stage, as far as it is measured."""
        current = [START, *self.outline.stages][current_stage(self.directory.record, stage.index)]
        folder = self.directory.stage(current.index, current.name)
        for j, task in enumerate(self._tasks):
            if (path := self._responses(folder, task)).exists():
                self._cells[stage.row][j] = measured = self._measured(path, task)
                self._statistics.setdefault(folder, {})[path.stem] = measured.statistics
                if len({cell.rows for row in self._cells if (cell := row[j]) is not None}) > 1:
                    raise damaged(path, "it must have as many rows as after other stages")
        if (path := folder / "evaluation.json").exists():
            for name, value in read_json(path)["general"].items():
                if name not in self.general:
                    raise damaged(path, f"general: {name!r} is not measured in this run")
                self.general[name][stage.row] = value
