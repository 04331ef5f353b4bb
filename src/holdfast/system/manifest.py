"""Checksums of the files of a directory: noted when they are written, compared when they are read.

``manifest.jsonl`` gets a line for each file or folder before it takes its name. The line says what it will hold, and
what a file holds until then, so that a kill at any point leaves one of the two. Logs, which grow line by line, are not
noted.
Where there is no manifest, as in directories of version 0.1.0, nothing is compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import RunDirectoryError
from holdfast.system.files import (
    JsonError,
    append_jsonl,
    cut_torn_line,
    parse_json,
    parse_objects,
    read_appended,
    read_utf8,
    read_whole_lines,
    write_bytes,
)
from holdfast.system.files import read_json as read_plain_json

MANIFEST = "manifest.jsonl"
EXPORT = "holdfast.json"
"""The file in an exported folder that has the checksums of its files."""

DEPTH = 5
"""A file lies at most so many folders below the manifest that knows it."""

Facts = dict[str, Any]
"""What is known of a file: its size in ``bytes`` and its ``sha256``, hexadecimal."""

Entry = dict[str, Facts]
"""What is known of a folder, by the path of each file in it; of a single file, under the name ``""``."""


def file_facts(path: Path) -> Facts:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(file.read()) if size < 2**20 else hashlib.file_digest(file, "sha256")
        return {"bytes": size, "sha256": digest.hexdigest()}


def folder_facts(folder: Path, paths: Sequence[Path] | None = None) -> Entry:
    """Size and SHA-256 of files below a folder, by their path there; they are read side by side.

    Args:
        paths: the files; None: all that are there.
    """
    if paths is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(
            zip((path.relative_to(folder).as_posix() for path in paths), pool.map(file_facts, paths), strict=True)
        )


def text_facts(text: str) -> Facts:
    """Size and SHA-256 of a text file that is about to be written."""
    return content_facts(text.encode())


def content_facts(content: bytes) -> Facts:
    """Size and SHA-256 of a file that is about to be written."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def note(root: Path, path: Path, entry: Entry) -> None:
    """Note in the manifest of ``root`` what ``path``, below it, will hold from now on."""
    manifest, name = root / MANIFEST, path.relative_to(root).as_posix()
    if manifest.exists():
        cut_torn_line(manifest)
    line: dict[str, Any] = {"path": name, "files": entry}
    if path.is_file():
        now = {"": file_facts(path)}
        line |= {"before": now} if now in _entries(manifest).get(name, []) else {}
    append_jsonl(manifest, line, sync=True)


def write_noted(root: Path, path: Path, content: str | bytes) -> None:
    """Write a file whole, and note it in the manifest of ``root``; what is there and noted already stays."""
    content = content.encode() if isinstance(content, str) else content
    facts = content_facts(content)
    noted = _entries(root / MANIFEST).get(path.relative_to(root).as_posix(), [])
    if noted[-1:] == [{"": facts}] and path.is_file() and file_facts(path) == facts:
        return
    note(root, path, {"": facts})
    write_bytes(path, content)


def checksums(root: Path, names: Sequence[str]) -> list[str | None]:
    """The SHA-256 that the manifest of ``root`` has of each file, by its path there; None where it has none."""
    entries = _entries(root.absolute() / MANIFEST)
    return [found[-1].get("", {}).get("sha256") if (found := entries.get(name)) else None for name in names]


def noted_alike(root: Path, one: Path, other: Path) -> bool:
    """Whether the manifest of ``root`` knows two folders, and says that they hold the same files."""
    entries = _entries(root.absolute() / MANIFEST)
    found, known = (entries.get(folder.relative_to(root).as_posix(), [])[-1:] for folder in (one, other))
    return bool(found) and found == known


def check(path: Path) -> None:
    """Compare a file, or the files of a folder, with what the nearest manifest above says.

    Raises:
        RunDirectoryError: a file is missing or damaged; the message names it.
    """
    path = path.absolute()
    whole = root = str(path)  # texts, since this is asked of every file that is read
    for _ in range(DEPTH):
        root = root.rpartition(os.sep)[0]
        entries = _entries(place := f"{root}{os.sep}{MANIFEST}")
        name = whole[len(root) :].lstrip(os.sep).replace(os.sep, "/")
        if known := entries.get(name):
            try:
                _compare(Path(place), path, known)
            except RunDirectoryError:
                _read.pop(place)  # another process may have written both since, on a shared disk
                _compare(Path(place), path, _entries(place)[name])
            return


def check_weights_files(folder: Path) -> None:
    """Compare a folder of weights with what the manifest above it says, or the one of an export in it.

    Of an export, whose tokenizer and settings belong to its user, the weights alone are compared.

    Raises:
        RunDirectoryError: a file is missing or damaged; the message names it.
    """
    check(folder)
    if (folder / EXPORT).is_file():
        exported = read_plain_json(folder / EXPORT)
        files: Any = exported.get("files", {}) if isinstance(exported, dict) else None
        if not _is_entry(files):
            raise RunDirectoryError(f"{folder / EXPORT}: is damaged: files has no checksums; export the stage again")
        compare(folder / EXPORT, folder, {name: f for name, f in files.items() if name.endswith(".safetensors")})


def compare(manifest: Path, path: Path, expected: Entry) -> None:
    """Compare a file or a folder with what a manifest says; raises as :func:`check`."""
    _compare(manifest, path, [expected])


def read_json(path: Path) -> Any:
    """Read a JSON file that holdfast wrote, compared with its manifest."""
    check(path)
    try:
        return parse_json(read_utf8(path))
    except JsonError as error:
        raise _damaged(path, str(error)) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file that holdfast wrote whole, compared with its manifest."""
    check(path)
    lines = read_utf8(path).split("\n")
    if (whole := parse_objects([line for line in lines if line])) is not None:
        return whole
    rows = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                rows.append(parse_json(line))
                if not isinstance(rows[-1], dict):
                    raise JsonError("it is no object")
            except JsonError as error:
                raise _damaged(path, f"line {number}: {error}") from None
    return rows


def _damaged(path: Path, why: str) -> RunDirectoryError:
    """What is wrong with a file, and what can be done about it."""
    return RunDirectoryError(f"{path}: is damaged: {why}; {remedy(path)}")


@dataclass
class _Known:
    """What was read of a manifest, which only grows.

    Attributes:
        state: its inode, time and size then.
        end: the bytes of its whole lines, which were read.
    """

    state: tuple[int, int, int]
    end: int = 0
    entries: dict[str, list[Entry]] = field(default_factory=dict)


_read: dict[str, _Known] = {}
"""By path."""


def _entries(manifest: Path | str) -> dict[str, list[Entry]]:
    """By path, what a file or folder may hold: what the last line about it says, or what it held until then.

    Of a manifest that has grown since it was read, only what is new is read.

    Raises:
        RunDirectoryError: the manifest itself is damaged.
    """
    place = str(manifest)
    try:
        found = os.stat(place)  # noqa: PTH116 - this is asked of every file that is read
    except OSError:
        return {}
    state, known = (found.st_ino, found.st_mtime_ns, found.st_size), _read.get(place)
    if known is None or known.state != state:
        if known is None or known.state[0] != state[0] or known.state[2] >= state[2]:
            known = _Known(state)
        if known.end or _is_ours(Path(place)):
            _read_on(Path(place), known)
        known.state = state
        _read[place] = known
    return known.entries


def _read_on(manifest: Path, known: _Known) -> None:
    """Read the lines from where reading ended."""
    content, end = read_whole_lines(manifest, known.end)
    try:
        lines = parse_objects(content.decode().removesuffix("\n").split("\n") if content else [])
    except UnicodeDecodeError:
        lines = None
    for line in read_appended(manifest) if lines is None else lines:  # the former says which line is damaged
        path, before = line.get("path"), line.get("before")
        files: Any = line.get("files")
        if not (isinstance(path, str) and _is_entry(files) and (before is None or _is_entry(before))):
            raise RunDirectoryError(
                f"{manifest}: is damaged: a line has no path or no checksums; restore it from a copy, or delete "
                "it, so that nothing is compared"
            )
        earlier = known.entries.get(path, [])[-1:] if before is None else [before]
        known.entries[path] = [*earlier, files]
    known.end = end


def _is_ours(manifest: Path) -> bool:
    """Whether a file of this name is a manifest of holdfast's, as it is at least in a run's directory."""
    with manifest.open("rb") as file:
        return file.read(9) == b'{"path": ' or (manifest.parent / "run.json").exists()


def _is_entry(files: Any) -> bool:
    """Whether a JSON value can be an :data:`Entry`."""
    if not isinstance(files, dict):
        return False
    for facts in files.values():
        if not isinstance(facts, dict) or type(facts.get("bytes")) is not int or type(facts.get("sha256")) is not str:
            return False
    return True


def _compare(manifest: Path, path: Path, known: list[Entry]) -> None:
    """Raise RunDirectoryError unless the files are those of one of these entries, the last of which counts most."""
    reasons = [
        next(filter(None, (_differs(path, name, facts) for name, facts in entry.items())), None) for entry in known
    ]
    if all(reasons):
        file, why = reasons[-1]  # type: ignore[misc]
        raise RunDirectoryError(f"{file}: is damaged: {why} ({manifest} says what it was); {remedy(file)}")


def _differs(path: Path, name: str, expected: Facts) -> tuple[Path, str] | None:
    """The file that is not as expected, and why; None if it is."""
    file = path / name if name else path
    try:
        facts = file_facts(file)
    except OSError:
        return file, "it is missing"
    if facts["bytes"] != expected["bytes"]:
        return file, f"it has {facts['bytes']} bytes, not {expected['bytes']}"
    if facts["sha256"] != expected["sha256"]:
        return file, "its SHA-256 is another"
    return None


def remedy(file: Path) -> str:
    """What can be done about a damaged file."""
    again = "and the command that wrote it makes it again"
    if file.name == STATISTICS:
        return f"delete it, {again}"
    stage = next((p for p in file.parents if p.parent.name == "stages"), None)
    checkpoint = next((p for p in file.parents if p.name.startswith("checkpoint-")), None)
    if file.name == "run.json" or (stage is None and checkpoint is None and file.name not in MADE_AGAIN):
        return "restore it from a copy"
    if checkpoint is not None:
        return f"delete {checkpoint}, {again} from the checkpoint before, or from the stage's start"
    if stage is None:
        return f"delete it, {again}"
    if file.name == "evaluation.json" or "responses" in file.parts:
        return f"restore it from a copy, or delete evaluation.json and responses in {stage}, {again}"
    return f"restore it from a copy, or delete {stage} and the stages after it, {again}"


MADE_AGAIN = ("matrix.json", "result.json")
STATISTICS = "statistics.safetensors"
