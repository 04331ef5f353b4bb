"""Checksums of the files of a directory: noted when they are written, compared when they are read.

``manifest.jsonl`` gets a line for each file or folder before it takes its name. The line says what it will hold, and
what a file holds until then, so that a kill at any point leaves one of the two. Logs, which grow line by line, are not
noted.
Where there is no manifest, as in directories of version 0.1.0, nothing is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from holdfast.errors import RunDirectoryError
from holdfast.system.files import (
    JsonError,
    append_jsonl,
    cut_torn_line,
    parse_json,
    read_appended,
    read_utf8,
    write_text,
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
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
    content = text.encode()
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


def write_noted(root: Path, path: Path, text: str) -> None:
    """Write a text file whole, and note it in the manifest of ``root``; what is there and noted already stays."""
    facts = text_facts(text)
    noted = _entries(root / MANIFEST).get(path.relative_to(root).as_posix(), [])
    if noted[-1:] == [{"": facts}] and path.is_file() and file_facts(path) == facts:
        return
    note(root, path, {"": facts})
    write_text(path, text)


def check(path: Path) -> None:
    """Compare a file, or the files of a folder, with what the nearest manifest above says.

    Raises:
        RunDirectoryError: a file is missing or damaged; the message names it.
    """
    path = path.absolute()
    for root in path.parents[:DEPTH]:
        known = _entries(root / MANIFEST).get(path.relative_to(root).as_posix())
        if known:
            try:
                _compare(root / MANIFEST, path, known)
            except RunDirectoryError:
                _read.pop(root / MANIFEST)  # another process may have written both since, on a shared disk
                _compare(root / MANIFEST, path, _entries(root / MANIFEST)[path.relative_to(root).as_posix()])
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
    with _remedied(path):
        return parse_json(read_utf8(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file that holdfast wrote whole, compared with its manifest."""
    check(path)
    rows = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line:
            with _remedied(path, f"line {number}: "):
                rows.append(parse_json(line))
                if not isinstance(rows[-1], dict):
                    raise JsonError("it is no object")
    return rows


@contextlib.contextmanager
def _remedied(path: Path, place: str = "") -> Iterator[None]:
    """Tell what is wrong with JSON, and what can be done about its file."""
    try:
        yield
    except JsonError as error:
        raise RunDirectoryError(f"{path}: is damaged: {place}{error}; {remedy(path)}") from None


_read: dict[Path, tuple[tuple[int, int], dict[str, list[Entry]]]] = {}
"""The manifests that were read, with their time and size: they only grow."""


def _entries(manifest: Path) -> dict[str, list[Entry]]:
    """By path, what a file or folder may hold: what the last line about it says, or what it held until then.

    Raises:
        RunDirectoryError: the manifest itself is damaged.
    """
    try:
        found = manifest.stat()
    except OSError:
        return {}
    state = found.st_mtime_ns, found.st_size
    if manifest not in _read or _read[manifest][0] != state:
        entries: dict[str, list[Entry]] = {}
        for line in read_appended(manifest) if _is_ours(manifest) else []:
            entry, known = [line.get("files"), line.get("before", {})], isinstance(line.get("path"), str)
            if not known or not all(map(_is_entry, entry)):
                raise RunDirectoryError(
                    f"{manifest}: is damaged: a line has no path or no checksums; restore it from a copy, or delete "
                    "it, so that nothing is compared"
                )
            before = [line["before"]] if "before" in line else entries.get(line["path"], [])[-1:]
            entries[line["path"]] = [*before, line["files"]]
        _read[manifest] = state, entries
    return _read[manifest][1]


def _is_ours(manifest: Path) -> bool:
    """Whether a file of this name is a manifest of holdfast's, as it is at least in a run's directory."""
    with manifest.open("rb") as file:
        return file.read(9) == b'{"path": ' or (manifest.parent / "run.json").exists()


def _is_entry(files: Any) -> bool:
    """Whether a JSON value can be an :data:`Entry`."""
    return isinstance(files, dict) and all(
        isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("sha256"), str)
        for facts in files.values()
    )


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
    if not file.is_file():
        return file, "it is missing"
    if (size := file.stat().st_size) != expected["bytes"]:
        return file, f"it has {size} bytes, not {expected['bytes']}"
    if file_facts(file)["sha256"] != expected["sha256"]:
        return file, "its SHA-256 is another"
    return None


def remedy(file: Path) -> str:
    """What can be done about a damaged file."""
    again = "and the command that wrote it makes it again"
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
