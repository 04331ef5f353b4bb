"""The sibling of a run: all of it that never saw what goes, bit for bit."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.config.run import RunConfig
from holdfast.data.row_pictures import KEPT
from holdfast.records.directory import file_name
from holdfast.records.kept import shown_pictures
from holdfast.records.read import FinishedRun
from holdfast.records.shapes import read_appended, read_json, read_jsonl
from holdfast.runner.rebuild.plan import Plan
from holdfast.system.files import json_file, jsonl_file, write_jsonl, write_text
from holdfast.system.manifest import check, file_facts, folder_facts, note, write_noted

Gone = Mapping[str, Mapping[str, Sequence[int]]]
"""The places of the rows that go, by task and by the name of their file in the run's own data."""

WEIGHTS = ("model", "adapter", "method")
RUN = "{run}"


@dataclass(frozen=True)
class Renewed:
    """What records of a run say otherwise from now on.

    Attributes:
        paths: folders of its own data, as its configuration has them, and what they are called then.
        labels: by task, the answers that no row of it has any more.
    """

    paths: Mapping[str, str]
    labels: Mapping[str, Collection[str]]

    def of(self, value: Any) -> Any:
        """A JSON value, such as a configuration."""
        if isinstance(value, list):
            return [self.of(below) for below in value]
        if not isinstance(value, dict):
            return self.paths.get(value, value) if isinstance(value, str) else value
        found = {key: self.of(below) for key, below in value.items()}
        if isinstance(lost := self.labels.get(str(value.get("name"))), set) and isinstance(value.get("labels"), list):
            found["labels"] = [label for label in value["labels"] if label not in lost] or None
        return found


def renewed(run: FinishedRun, made: Plan, gone: Gone) -> Renewed:
    """Folders are numbered as if what goes had never been there, and labels are those of the rows that stay."""
    listed = {task["name"]: task for task in run.config["stream"].get("tasks") or []}
    paths: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for number, name in enumerate(made.kept(list(run.info["tasks"])), start=1):
        path = listed.get(name, {}).get("path") or ""
        if found := re.fullmatch(r"(\{run\}/data/)\d\d+(-.*)", path):
            paths[path] = f"{found[1]}{number:02d}{found[2]}"
        if name in gone and (folder := own_folder(run, listed[name])) is not None:
            went, left = set[str](), set[str]()
            for file in folder.glob("*.jsonl"):
                places = set(gone[name].get(file.name, ()))
                for n, row in enumerate(read_jsonl(file)):
                    (went if n in places else left).update(_texts(row))
            labels[name] = went - left
    return Renewed(paths, labels)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value.strip()
    for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(below)


def copy_data(run: FinishedRun, root: Path, removed: Sequence[str], gone: Gone, changes: Renewed) -> None:
    """Copy what the run keeps of its data, without the tasks and the rows that go, and its own general samples."""
    if (general := run.path / "general").is_dir():
        for own in sorted(entry for entry in general.iterdir() if entry.is_dir()):
            _link(own, root / "general" / own.name)
            note(root, root / "general" / own.name, folder_facts(root / "general" / own.name))
    for task in run.config["stream"].get("tasks") or []:
        folder = own_folder(run, task)
        if folder is None or task["name"] in removed or not folder.is_dir():
            continue
        target = root / changes.paths.get(task["path"], task["path"]).removeprefix(f"{RUN}/")
        for file in sorted(folder.iterdir()):
            places = set(gone.get(task["name"], {}).get(file.name, ()))
            if places:
                write_jsonl(target / file.name, [row for n, row in enumerate(read_jsonl(file)) if n not in places])
            else:
                _link(file, target / file.name)
        note(root, target, folder_facts(target))
    for name in sorted(shown_pictures(root)):
        _link(run.path / KEPT / name, root / KEPT / name)
    if (run.path / "learn.json").exists():
        _copy_learned(run, root, removed, gone, changes)


def own_folder(run: FinishedRun, task: Mapping[str, Any]) -> Path | None:
    """Where the rows of a task lie, if that is in the run's directory."""
    path = task.get("path") or ""
    inside = path.startswith(f"{RUN}/") and ".." not in Path(path).parts
    return run.path / path.removeprefix(f"{RUN}/") if inside else None


def _copy_learned(run: FinishedRun, root: Path, removed: Sequence[str], gone: Gone, changes: Renewed) -> None:
    """What learn keeps of the tasks, and the hashes of their rows."""
    state = changes.of(read_json(run.path / "learn.json"))
    state["tasks"] = [task for task in state["tasks"] if task["name"] not in removed]
    for task in state["tasks"]:
        for side in ("train", "test"):
            task[side] -= len(gone.get(task["name"], {}).get(f"{side}.jsonl", ()))
    write_noted(root, root / "learn.json", json_file(state))
    hashes = run.path / "data" / "rows.jsonl"
    if not hashes.exists():
        return
    counts: dict[tuple[str, str], int] = {}
    lines = []
    for line in read_jsonl(hashes):
        place = counts.get(key := (line["task"], line["side"]), 0)
        counts[key] = place + 1
        if line["task"] not in removed and place not in gone.get(line["task"], {}).get(f"{line['side']}.jsonl", ()):
            lines.append(line)
    write_noted(root, root / "data" / "rows.jsonl", jsonl_file(lines))


def copy_stages(run: FinishedRun, root: Path, made: Plan, measured: Mapping[str, Any], changed: Sequence[str]) -> None:
    """Copy the stages that are kept, without the responses to what goes.

    Args:
        measured: the tasks with their test rows as they are now, by name.
        changed: the tasks whose rows are others now; responses to other test rows are not kept.
    """
    names = list(run.info["tasks"])
    kept = made.kept(names)
    for number, folder in run.folders.items():
        if number >= made.first and number:
            continue
        target = root / "stages" / folder.name
        for name in WEIGHTS:
            if (folder / name).is_dir():
                check(folder / name)
                _link(folder / name, target / name)
                note(root, target / name, folder_facts(target / name))
        files = [(folder / name, target / name) for name in ("stage.json", "evaluation.json")]
        files += [(file, target / "responses" / "general" / file.name) for file in folder.glob("responses/general/*")]
        for task in kept:
            responses = folder / "responses" / f"{file_name(task, names)}.jsonl"
            if responses.exists() and (task not in changed or _same_rows(responses, measured[task])):
                files.append((responses, target / "responses" / f"{file_name(task, kept)}.jsonl"))
        for file, place in files:
            if file.exists():
                check(file)
                _link(file, place)
                note(root, place, {"": file_facts(place)})
    for name in ("events.jsonl", "curves.jsonl"):
        if (run.path / name).exists():
            lines = [line for line in read_appended(run.path / name) if line["stage"] < made.first]
            write_text(root / name, jsonl_file(lines))


def _same_rows(responses: Path, task: Any) -> bool:
    """Whether responses are to the very test rows that a task has now."""
    rows = read_jsonl(responses)
    return len(rows) == len(task.test) and all(
        row.get("prompt", example.question) == example.question and row.get("answer", example.answer) == example.answer
        for row, example in zip(rows, task.test, strict=True)
    )


def with_output(config: Mapping[str, Any], output: Path, model: str) -> RunConfig:
    """A recorded configuration for a run elsewhere, with its base model where it lies now."""
    return RunConfig.model_validate(
        dict(config) | {"output": str(output), "model": dict(config["model"]) | {"name": model}}
    )


def _link(source: Path, target: Path) -> None:
    """Give a file, or all files of a folder, a second name; or copy them where the disk has only one name a file."""
    for file, place in _files(source, target):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:
            shutil.copy2(file, place)


def _files(source: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    if source.is_dir():
        yield from ((file, target / file.relative_to(source)) for file in sorted(source.rglob("*")) if file.is_file())
    else:
        yield source, target
