"""Make a run again without a task, or without some rows."""

from __future__ import annotations

import datetime
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import with_config
from typing_extensions import TypedDict

from holdfast.api.task import Task
from holdfast.config.reading import validate
from holdfast.config.run import RunConfig, load_config
from holdfast.config.stream import TaskConfig
from holdfast.data.files import where
from holdfast.errors import ConfigError, RunDirectoryError, did_you_mean
from holdfast.records.directory import keeps_rows, open_directory, require_runs
from holdfast.records.follow import STATE as TRACKED
from holdfast.records.follow import anew
from holdfast.records.read import FinishedRun, read_run
from holdfast.records.shapes import checked, read_json
from holdfast.records.stages import complete_stages
from holdfast.records.trust import require_trust
from holdfast.runner.data import load_data
from holdfast.runner.rebuild.build import Gone, copy_data, copy_stages, own_folder, renewed, with_output
from holdfast.runner.rebuild.plan import Plan, plan, record_before
from holdfast.runner.rebuild.rows import all_said, matching, said_by, said_in
from holdfast.runner.rebuild.swap import STATE, exchange, recover, sibling
from holdfast.runner.reload import find_base
from holdfast.runner.run import run as go_on
from holdfast.runner.setup import Setup, prepare, resolve
from holdfast.system.files import json_file, whole_folder, write_json
from holdfast.system.files import read_json as read_plain_json
from holdfast.system.manifest import write_noted
from holdfast.system.progress import Progress
from holdfast.system.shapes import AS_WRITTEN, Facts

NAMED = 20
"""Rows that are named at most."""


def rebuild(
    run: Path | str,
    *,
    without: str | Sequence[str] | None = None,
    without_rows: Path | str | None = None,
    progress: Progress | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Make a run again without tasks, or without some rows, and let it take the old run's place.

    The first stage that they took part in and all after it are learned again, from the stage before, in a directory
    beside the run, with memories, caches, responses and copies of data that never saw them. The old run stays as it is
    until then. A call that was stopped or killed goes on with the same call, and ends with the same numbers.

    Args:
        run: a run's directory.
        without: the tasks that go.
        without_rows: a data file of the rows that go, in any format. They are known again by what they say. Rows that
            stand in files outside the run's directory must be taken out of these files first.
        progress: shows the progress; None: on standard error.
        trust: run the code that the run's record names.

    Returns:
        The content of matrix.json of the new run; with ``without_rows`` also ``rows``: how many the file holds
        (``given``), how many of them were found and removed (``removed``), and where it has the others (``not_found``).

    Raises:
        ConfigError: there is no such task, no task holds such rows, they stand in files outside, no task would be left,
            or another rebuilding is not finished.
        RunDirectoryError: there is no run, another process uses it, or data, model or texts are no longer those that it
            was made with.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    path, progress = Path(run), progress or Progress()
    if path.name in ("", "..") or path.is_symlink():  # the new run is made beside it
        path = path.resolve()
    if (without is None) == (without_rows is None):
        raise ConfigError("give the tasks that go (--without TASK) or a file of the rows that go (--without-rows FILE)")
    if recover(path):
        progress.line(f"{path}: the rebuilding that was under way is finished")
        return _result(path, progress)
    require_runs([path])
    with open_directory(path):
        tasks = [without] if isinstance(without, str) else list(without or [])
        ask = Ask(read_run(path), tasks, None if without_rows is None else Path(without_rows), trust)
        state = ask.begun(progress) or ask.begin(progress)
        if not state["finished"]:
            for step in state["steps"]:
                config = validate(RunConfig, step["config"], str(sibling(path) / STATE))
                require_trust(sibling(path), config, trust, measures=True)  # the folder may be somebody else's, too
                if len(step["tasks"]) >= len(read_json(sibling(path) / "run.json")["tasks"]):
                    go_on(config, progress)
            _finish(path, state)
        exchange(path)
    progress.line(f"{path}: is made again, and in its place")
    progress.line(f"report: {path / 'report.html'}")
    return _result(path, progress)


def _result(path: Path, progress: Progress) -> dict[str, Any]:
    """The new run's matrix.json, and what became of the rows that were to go, which is told, too."""
    matrix, made = read_json(path / "matrix.json"), read_json(path / "run.json")["rebuilt"][-1]
    if "rows" not in made:
        return matrix
    progress.line(_told(made["rows"], "found and removed"))
    return matrix | {"rows": made["rows"]}


@with_config(AS_WRITTEN)
class _Identity(TypedDict):
    tasks: list[str]
    rows: str | None


@with_config(AS_WRITTEN)
class _Step(TypedDict):
    tasks: list[str]
    config: Facts


@with_config(AS_WRITTEN)
class _State(TypedDict):
    """What is noted of a rebuilding that is under way."""

    ask: _Identity
    of: str
    note: Facts
    steps: list[_Step]
    finished: bool


@dataclass
class Ask:
    """What is asked of a run."""

    run: FinishedRun
    tasks: list[str]
    file: Path | None
    trust: bool

    def __post_init__(self) -> None:
        known = self.names = list(self.run.info["tasks"])  # of matrix.json, an appended one may lack still
        for task in self.tasks:
            if task not in known:
                raise ConfigError(f"--without: {self.run.path} has no task {task!r}{did_you_mean(task, known)}")
        self.given = said_in(self.file) if self.file is not None else []
        self.said = all_said(self.given)
        digest = hashlib.sha256("\n".join(sorted(self.said)).encode()).hexdigest()
        self.identity = {"tasks": sorted(self.tasks), "rows": digest if self.said else None}
        self.of = hashlib.sha256((self.run.path / "run.json").read_bytes()).hexdigest()

    def begun(self, progress: Progress) -> dict[str, Any] | None:
        """The state of the same rebuilding, if it was begun; one of a run that has changed since is deleted.

        Raises:
            ConfigError: another one was begun.
        """
        made = sibling(self.run.path)
        if not (made / STATE).is_file():
            if made.exists():
                raise RunDirectoryError(f"{made}: is in the way; a run is made again there. Move it")
            return None
        state: dict[str, Any] = checked(made / STATE, _State, read_plain_json(made / STATE))
        if state["ask"] != self.identity:
            what = f"without {', '.join(state['ask']['tasks'])}" if state["ask"]["tasks"] else "without some rows"
            raise ConfigError(
                f"{self.run.path}: is being made again {what}, in {made}; finish that with its own command, or delete "
                "that folder"
            )
        if state["of"] == self.of:
            return state
        progress.line(f"{made}: is deleted, since the run has changed since then")
        shutil.rmtree(made)
        return None

    def begin(self, progress: Progress) -> dict[str, Any]:
        """Make the sibling, as the run stood before the first stage that is made again."""
        run, path = self.run, self.run.path
        if not keeps_rows(path):
            raise ConfigError(
                f"{path}: keeps no rows (--memory none), so nothing can be learned again; `holdfast rollback` goes "
                "back, and `holdfast learn` into a new directory learns what is left"
            )
        require_trust(path, load_config(run.config), self.trust, measures=True)
        model = _model(run)
        gone, touched, rows = self._rows(model) if self.file is not None else ({}, [], {})
        first = min(1 if run.joint else self.names.index(task) + 1 for task in self.tasks or touched)
        done = complete_stages(run)
        made = plan(run.info, done, without=self.tasks, first=first, joint=run.joint)
        note: dict[str, Any] = {"tasks": self.tasks} if self.tasks else {"rows_of": touched, "rows": rows}
        note |= {"undone": made.undone} if made.undone else {}
        again = [t for t in done if t >= first and (run.joint or self.names[t - 1] not in made.removed)]
        _tell(run, made, [run.folders[t].name.partition("-")[2] for t in again], progress)
        if rows:
            progress.line(_told(rows, "found"))
        changes = renewed(run, made, gone)
        configs = [changes.of(step["config"]) for step in made.configs]
        with whole_folder(sibling(path)) as partial:
            copy_data(run, partial, made.removed, gone, changes)
            setup = self._copy_stages(partial, made, touched, [with_output(c, partial, model) for c in configs])
            there = [with_output(config, sibling(path), model).model_dump(mode="json") for config in configs]
            record = changes.of(record_before(run.info, made)) | setup.facts() | {"config": there[0]}
            write_noted(partial, partial / "run.json", json_file(record))
            steps = [step | {"config": config} for step, config in zip(made.configs, there, strict=True)]
            state = {"ask": self.identity, "of": self.of, "note": note, "steps": steps, "finished": False}
            if trackers := anew(path):
                write_json(partial / TRACKED, trackers)
            write_json(partial / STATE, state)
        return state

    def _copy_stages(self, root: Path, made: Plan, touched: Sequence[str], configs: Sequence[RunConfig]) -> Setup:
        """Copy the stages that are kept; returns how the run stood before the first that is made again."""
        data = load_data(configs[-1])
        changed = _changed(self.run, data.stream.tasks)
        if others := [name for name in changed if name not in touched]:
            raise RunDirectoryError(
                f"{self.run.path}: the data of {', '.join(others)} changed since this run learned them; put them back "
                "as they were"
            )
        copy_stages(self.run, root, made, {task.name: task for task in data.stream.tasks}, changed)
        return prepare(resolve(configs[0]))

    def _rows(self, model: str) -> tuple[Gone, list[str], dict[str, Any]]:
        """The places of the rows that go, all tasks whose rows are others than the run learned, and how many of the
        file's rows go.

        Raises:
            ConfigError: rows stand in files that are not the run's, or in none.
        """
        run = self.run
        gone: dict[str, dict[str, list[int]]] = {}
        found: set[str] = set()
        for task in run.config["stream"].get("tasks") or []:
            folder = own_folder(run, task)
            if folder is None or not folder.is_dir():
                continue
            options = validate(TaskConfig, task, str(run.path / "run.json"))
            for file in sorted(folder.glob("*.jsonl")):
                rows = said_in(file, options)
                if places := matching(rows, self.said):
                    if len(places) == len(rows):
                        raise ConfigError(
                            f"--without-rows: would leave no row in {file}; --without {task['name']} makes the run "
                            "again without this task"
                        )
                    gone.setdefault(task["name"], {})[file.name] = places
                    found |= all_said(rows[place] for place in places)
        data = load_data(with_output(run.config, run.path, model))
        outside = [task for task in data.stream.tasks if task.name not in gone]
        if places_outside := [place for task in outside for place in self._outside(task)]:
            listed = "".join(f"\n  {place}" for place in places_outside[:NAMED])
            more = f"\n  and {len(places_outside) - NAMED} more" if len(places_outside) > NAMED else ""
            raise ConfigError(
                f"--without-rows: these rows stand in files of yours, outside {run.path}:{listed}{more}\n"
                "take them out there, and give the same command again"
            )
        changed = _changed(run, data.stream.tasks)
        touched = [name for name in self.names if name in gone or name in changed]
        if not touched:
            raise ConfigError(f"--without-rows: no task of {run.path} holds any row of {self.file}")
        missing = [where(str(self.file), place) for place, said in enumerate(self.given) if said.isdisjoint(found)]
        counts = {"given": len(self.given), "removed": len(self.given) - len(missing), "not_found": missing}
        return (
            gone,
            touched,
            counts | ({"taken_out": taken} if (taken := [n for n in changed if n not in gone]) else {}),
        )

    def _outside(self, task: Task) -> list[str]:
        """Where rows that go stand in the files of a task."""
        examples = [*task.train, *task.eval, *task.test]
        found = set()
        listed = {t["name"]: t for t in self.run.config["stream"].get("tasks") or []}
        options = validate(TaskConfig, listed[task.name], "run.json") if task.name in listed else None
        for name in dict.fromkeys(example.file for example in examples):
            if Path(name).is_file():
                found |= {where(name, place) for place in matching(said_in(Path(name), options), self.said)}
            else:
                own = [e for e in examples if e.file == name]
                found |= {where(name, e.row) for e in own if said_by(e) in self.said}
        return sorted(found)


def _changed(run: FinishedRun, tasks: Sequence[Task]) -> list[str]:
    """The tasks whose rows are not those that the run learned."""
    return [task.name for task in tasks if task.fingerprint != run.info["tasks"][task.name]["fingerprint"]]


def _model(run: FinishedRun) -> str:
    """The base model: as the run names it, or where it lies now."""
    name: str = run.config["model"]["name"]
    base = find_base(run, name, needed=True)
    return name if base == name or Path(name).resolve() == Path(base) else base


def _tell(run: FinishedRun, made: Plan, again: Sequence[str], progress: Progress) -> None:
    left = ("no stage is kept", "stage 1 is kept", f"stages 1 to {made.first - 1} are kept")[min(made.first - 1, 2)]
    what = f"{', '.join(again)} made again in {sibling(run.path)}" if again else "none is made again"
    progress.line(f"{run.path}: {left}, {what}")
    if made.undone:
        progress.line(f"{', '.join(made.undone)}: undone before, hence removed, too")


def _told(rows: Mapping[str, Any], what: str) -> str:
    """How many of the rows that were to go did, and where the file has the others."""
    missing = rows["not_found"]
    text = f"{rows['removed']} of {rows['given']} rows {what}"
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        text += f"; not found: {', '.join(missing[:NAMED])}{more}"
    if rows.get("taken_out"):
        text += f"; the data of {', '.join(rows['taken_out'])} have changed, so what was taken out of them is not found"
    return text


def _finish(path: Path, state: Mapping[str, Any]) -> None:
    """Let the sibling's record be the run's, and its page."""
    from holdfast.report import write_report

    made, old = sibling(path), read_json(path / "run.json")
    with open_directory(made) as directory:
        record = directory.record
        back = {"output": old["config"]["output"], "model": old["config"]["model"], "gate": old["config"].get("gate")}
        record["config"] |= back
        for stage in record.get("stages", []):
            stage["config"] |= back
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record["rebuilt"] = [*old.get("rebuilt", []), dict(state["note"]) | {"at": at}]
        directory.write()
        write_report([made], made / "report.html")
        write_json(made / STATE, dict(state) | {"finished": True})
