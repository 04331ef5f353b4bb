"""What a run that learns keeps of what it was given: learn.json, and in data/ the rows and their hashes."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.config.run import RUN
from holdfast.data.given import GivenRow
from holdfast.data.row_pictures import KEPT, kept_name, kept_names
from holdfast.data.sides import Divided, Side
from holdfast.records.directory import LEARN, file_name, learned_stages
from holdfast.records.shapes import read_json, read_jsonl
from holdfast.system.files import json_file, jsonl_file, write_bytes, write_jsonl
from holdfast.system.files import whole_folder as whole
from holdfast.system.manifest import folder_facts, note, write_noted

DATA, ROWS = "data", "rows.jsonl"
OWN = "general/own"
"""Where the samples lie that the model wrote of itself before it learned anything."""
FORMAT = 1


@dataclass
class Kept:
    """The state of a run that learns.

    Attributes:
        path: the run's directory.
        memory: whether rows are kept; if not, of all rows only hashes are.
        given: the configuration's keys that the user has set, over all calls.
        settled: those that the first call has set by the machine, the model and the data.
        own: how the model writes samples of itself, ``length`` and ``chat``; empty where it writes none.
        tasks: in order; each with its ``name``, ``data`` (what was given), ``fingerprint``, ``options`` (of a task of a
            stream), ``training`` (what was settled for it), numbers of rows and ``notes``, and ``given`` as of then.
    """

    path: Path
    memory: bool = True
    given: dict[str, Any] = field(default_factory=dict)
    settled: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Kept | None:
        """The state in a directory; None if no call of learn began there.

        Raises:
            RunDirectoryError: its file is damaged.
        """
        file = path / LEARN
        if not file.is_file():
            return None
        state = read_json(file)
        return cls(path, **{key: state[key] for key in ("memory", "given", "settled", "own", "tasks")})

    def write(self) -> None:
        """Write learn.json."""
        state = {"format": FORMAT, "memory": self.memory, "given": self.given, "settled": self.settled, "own": self.own}
        write_noted(self.path, self.path / LEARN, json_file(state | {"tasks": self.tasks}))

    # --- tasks ---

    @property
    def names(self) -> list[str]:
        """The names of the tasks, in order."""
        return [task["name"] for task in self.tasks]

    def free_name(self, name: str) -> str:
        """The name, or, if another task has it, the first of NAME-2, NAME-3 and so on that none has."""
        taken, number, free = self.names, 2, name
        while free in taken:
            free, number = f"{name}-{number}", number + 1
        return free

    def drop_unbegun(self) -> None:
        """Forget a last task, and the settings that came with it, if the run never took it over: the call was killed at
        once, or refused."""
        begun = self._record().get("tasks", {})
        while self.tasks and self.tasks[-1]["name"] not in begun:
            shutil.rmtree(self.folders()[-1], ignore_errors=True)
            self.tasks.pop()
            drop_pictures(self.path)
        if self.tasks:
            self.given = self.tasks[-1]["given"]

    def finished(self) -> bool:
        """Whether all tasks are learned and measured."""
        record = self._record()
        return not self.tasks or (len(record["tasks"]) == len(self.tasks) and record.get("finished") is not None)

    def _record(self) -> dict[str, Any]:
        file = self.path / "run.json"
        return read_json(file) if file.is_file() else {}

    def learned(self) -> list[str]:
        """The tasks that the weights hold, or will hold once the run is finished; not those that were undone."""
        done, record = len(self.tasks), self._record()
        stages = learned_stages(record, done) if record else list(range(1, done + 1))
        return [self.tasks[stage - 1]["name"] for stage in stages]

    def find(self, fingerprint: str | None) -> dict[str, Any] | None:
        """The learned task of these data, if there is one."""
        learned = self.learned()
        return next((t for t in self.tasks if t["fingerprint"] == fingerprint and t["name"] in learned), None)

    # --- rows ---

    def folders(self) -> list[Path]:
        """Where the rows of the tasks lie, or would lie if rows were kept."""
        inside = [task["options"].get("path") or "" for task in self.tasks]
        return [self.path / path.removeprefix(f"{RUN}/") for path in inside if path.startswith(f"{RUN}/")]

    def next_folder(self, name: str) -> Path:
        """Where those of the next task are to lie; its number is beyond all that are there."""
        numbers = [folder.name.partition("-")[0] for folder in self.folders()]
        number = 1 + max([len(self.tasks), *(int(n) for n in numbers if n.isdecimal())])
        return self.path / DATA / f"{number:02d}-{file_name(name, [name])}"

    def seen(self) -> tuple[dict[str, Side], set[str]]:
        """The side of each prompt so far, and the rows that were learned or tested, both by hash."""
        names, learned = set(self.names), set(self.learned())
        lines = [line for line in self._lines() if line["task"] in names]
        return {line["prompt"]: line["side"] for line in lines}, {
            line["row"] for line in lines if line["task"] in learned
        }

    def sides_of(self, name: str) -> dict[str, Side]:
        """The sides of a task's rows, by their hashes."""
        return {line["row"]: line["side"] for line in self._lines() if line["task"] == name}

    def _lines(self) -> list[dict[str, Any]]:
        file = self.path / DATA / ROWS
        return read_jsonl(file) if file.is_file() else []

    def add(self, task: dict[str, Any], divided: Divided, usable: Mapping[Side, Sequence[GivenRow]]) -> None:
        """Keep the usable rows of a new task, unless the run keeps none, and the hashes of all; learn.json comes last.

        A call that was killed before its end leaves what the next one writes again.
        """
        for entry in (self.path / DATA).glob("*-*"):
            if entry.is_dir() and entry not in self.folders():
                shutil.rmtree(entry)
        if self.memory:
            folder = self.next_folder(task["name"])
            drop_pictures(self.path)
            for picture in {
                p.number: p for side in usable.values() for row in side for p in row.example.pictures
            }.values():
                file = self.path / KEPT / kept_name(picture)
                if not file.exists():  # a copy, which stays what it is when the giver's file is written anew
                    file.parent.mkdir(exist_ok=True)
                    write_bytes(file, picture.content())
            with whole(folder) as partial:
                for side, rows in usable.items():
                    write_jsonl(partial / f"{side}.jsonl", [row.values for row in rows])
                note(self.path, folder, folder_facts(partial))
        self.note(task | {"known": divided.known}, divided.train, divided.test)

    def note(self, task: dict[str, Any], train: Sequence[GivenRow], test: Sequence[GivenRow]) -> None:
        """Note the hashes and sides of a new task's rows, and then the task."""
        lines = [line for line in self._lines() if line["task"] in self.names]
        lines += [
            {"row": row.id, "prompt": row.prompt, "side": side, "task": task["name"]}
            for side, rows in (("train", train), ("test", test))
            for row in rows
        ]
        (self.path / DATA).mkdir(exist_ok=True)
        write_noted(self.path, self.path / DATA / ROWS, jsonl_file(lines))
        self.tasks.append(task | {"train": len(train), "test": len(test), "given": self.given})
        self.write()


def shown_pictures(root: Path) -> set[str]:
    """The files in a run's own folder of pictures that rows in its data show, by name."""
    return {name for file in (root / DATA).glob("*/*.jsonl") for name in kept_names(file.read_text(encoding="utf-8"))}


def drop_pictures(root: Path) -> None:
    """Delete the kept pictures that no row shows any more."""
    if (root / KEPT).is_dir():
        shown = shown_pictures(root)
        for file in (root / KEPT).iterdir():
            if file.name not in shown:
                file.unlink()


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One configuration over another, section by section; a method, a tuner, a list and columns are whole."""
    values = copy.deepcopy(dict(below))
    for key, value in above.items():
        under = values.get(key)
        sections = isinstance(under, dict) and isinstance(value, dict) and key not in ("tuner", "method", "columns")
        values[key] = merged(under, value) if sections else copy.deepcopy(value)  # type: ignore[arg-type]
    return values


def rows_fingerprint(rows: Iterable[GivenRow]) -> str:
    """SHA-256 (hexadecimal) over rows in any order."""
    return hashlib.sha256("".join(sorted(row.id for row in rows)).encode()).hexdigest()
