"""Files written whole or not at all: to a temporary name, flushed to disk, renamed; and files that grow by lines.

All of holdfast's JSON comes from here. JSON has no NaN and no infinity: a number that is not finite is written as null,
which means "not measured" to all that read it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from holdfast.errors import ConfigError, RunDirectoryError, UserError

LOCK = ".lock"
PARTIAL = ".partial"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole: a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + PARTIAL)
    remove_link(temporary)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def remove_link(path: Path) -> None:
    """Remove a link in a file's place, so that what is written there does not go to another file.

    Somebody else's directory may hold a link to a file of the user's.
    """
    if path.is_symlink():
        path.unlink()


def refuse_link(path: Path) -> None:
    """RunDirectoryError if a file that grows is a link; see :func:`remove_link`."""
    if path.is_symlink():
        raise RunDirectoryError(
            f"{path}: is a link to another file, which would be written to; put a file in its place"
        )


def json_text(value: Any, *, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """A value as JSON, numbers that are not finite as null."""
    dumps = partial(json.dumps, ensure_ascii=False, indent=indent, separators=separators, allow_nan=False)
    try:
        return dumps(value)
    except ValueError:
        return dumps(finite(value))


def finite(value: Any) -> Any:
    """A JSON value as it is read back after it was written: without NaN and infinity, tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [finite(below) for below in value]
    return value


def is_finite(value: Any) -> bool:
    """Whether a JSON value holds neither NaN nor infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, list | tuple) else True


def write_json(path: Path, value: Any, *, exact: bool = False) -> None:
    """Write a JSON file whole.

    Args:
        exact: for a state, which must be read back as it was.

    Raises:
        ValueError: ``exact``, and a number is not finite.
    """
    if exact and not is_finite(value):
        raise ValueError(f"{path.name}: a state cannot hold NaN or infinity: {value!r:.200}")
    write_text(path, json_file(value))


def json_file(value: Any) -> str:
    """The content of a JSON file."""
    return json_text(value, indent=1) + "\n"


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file whole."""
    write_text(path, jsonl_file(rows))


def jsonl_file(rows: Sequence[Mapping[str, Any]]) -> str:
    """The content of a JSON-lines file."""
    return "".join(json_text(row) + "\n" for row in rows)


def append_jsonl(path: Path, row: Mapping[str, Any], *, sync: bool = False) -> None:
    """Add a line to a JSON-lines file, which need not exist.

    Args:
        sync: return only when the line has reached the disk.
    """
    append_bytes(path, json_text(row).encode() + b"\n", sync=sync)


def append_bytes(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Add bytes to a file, which need not exist; see :func:`append_jsonl`."""
    refuse_link(path)
    with path.open("ab") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


class JsonError(ValueError):
    """The text is not JSON, or holds what no file of holdfast's does."""


def parse_json(text: str) -> Any:
    """The value of a JSON text of holdfast's; NaN and infinity, which version 0.1.0 could write, are None.

    Raises:
        JsonError: it is not JSON, is nested too deeply, or holds a number of too many digits, half a surrogate or a
            name that stands twice in an object.
    """
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # only an escape can be half a pair
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise JsonError(f"it is no JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise JsonError("it holds half a surrogate, which is no character") from None
    except JsonError:
        raise
    except ValueError:
        raise JsonError("it holds a number of too many digits") from None
    return value


def parse_objects(lines: Sequence[str]) -> list[dict[str, Any]] | None:
    """The objects of JSON lines that are not empty, at once, which takes half of the time; None where a look at each
    line must tell what is wrong with it."""
    try:
        values = parse_json(f"[{','.join(lines)}]")
    except JsonError:
        return None
    return values if len(values) == len(lines) and all(isinstance(value, dict) for value in values) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise JsonError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def _number(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=lambda _: None)


def read_json(path: Path) -> Any:
    """Read a JSON file that holdfast wrote; RunDirectoryError if it is damaged."""
    try:
        return parse_json(read_utf8(path))
    except JsonError as error:
        raise RunDirectoryError(f"{path}: is damaged: {error}; restore it from a copy") from None


def read_utf8(path: Path) -> str:
    """Read a text file that holdfast wrote.

    Raises:
        RunDirectoryError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunDirectoryError(
            f"{path}: is damaged: byte {error.start} is not UTF-8; restore it from a copy"
        ) from None
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be read: {error.strerror}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file that holdfast wrote: only a line feed ends a line, no other separator of Unicode.

    Raises:
        RunDirectoryError: a line is damaged.
    """
    return list(_objects(path, read_utf8(path).split("\n")))


def _objects(path: Path, lines: Sequence[str | bytes]) -> Iterator[dict[str, Any]]:
    """The objects of lines; empty lines are passed over."""
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line.decode() if isinstance(line, bytes) else line) if line else {}
            if not isinstance(value, dict):
                raise JsonError("it is no object")
        except UnicodeDecodeError:
            reason = "it is not UTF-8"
        except JsonError as error:
            reason = str(error)
        else:
            if line:
                yield value
            continue
        raise RunDirectoryError(
            f"{path}: line {number} is damaged: {reason}; restore the file from a copy, or delete the line"
        )


def cut_torn_line(path: Path) -> None:
    """Remove a last line that a kill cut off, so that the file can grow again."""
    refuse_link(path)
    with path.open("rb+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            whole, ended, _ = file.read().rpartition(b"\n")
            file.truncate(len(whole + ended))


def read_appended(path: Path) -> list[dict[str, Any]]:
    """Read a file that :func:`append_jsonl` adds to; a last line that a kill cut off is passed over.

    Returns:
        the lines; none if there is no such file.

    Raises:
        RunDirectoryError: another line is damaged.
    """
    content, _ = read_whole_lines(path)
    try:
        whole = parse_objects([line for line in content.decode().split("\n") if line])
    except UnicodeDecodeError:
        whole = None
    return list(_objects(path, content.split(b"\n"))) if whole is None else whole


def read_whole_lines(path: Path, start: int = 0) -> tuple[bytes, int]:
    """What such a file holds from a byte on, where a line begins, without a line that was cut off; and where that ends.

    Nothing if there is no such file; RunDirectoryError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            whole, ended, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return b"", start
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be read: {error.strerror}") from None
    return whole + ended, start + len(whole + ended)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which on success is flushed to disk and replaces ``path``.

    After a kill at any point, ``path`` is absent, the old folder, or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + PARTIAL)
    remove_link(temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    flush_folder(temporary)
    remove_link(path)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)
    _sync(path.parent)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make a folder if it is new, and hold its lock; one that was new and in which nothing was written goes again where
    an error ends it.

    Raises:
        RunDirectoryError: it is a file, cannot be written, or is in use by another process; or the disk became full
            under the lock.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"output: {path} is a file; it must be a directory, or not exist yet")
    if path.is_symlink() and not path.exists():
        raise RunDirectoryError(f"output: {path} is a link to {path.readlink()}, which is not there; make that folder")
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        remove_link(probe)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunDirectoryError(
            f"output: {path} cannot be written ({error.strerror}); choose another directory"
        ) from None
    refuse_link(path / LOCK)
    try:
        with FileLock(path / LOCK).acquire(timeout=0):
            try:
                yield
            except BaseException:
                if is_new and [entry.name for entry in path.iterdir()] == [LOCK]:
                    (path / LOCK).unlink()
                    path.rmdir()
                raise
    except Timeout:
        raise RunDirectoryError(
            f"output: {path} is in use by another process; wait for it, or choose another directory"
        ) from None
    except Exception as error:
        if isinstance(error, UserError) or not is_disk_full(error, path):
            raise
        raise RunDirectoryError(
            f"output: no space is left on the disk of {path}; what is complete is kept: free some space and run the "
            "same command again"
        ) from error


def flush_folder(folder: Path) -> None:
    """Flush every file below a folder to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        _sync(Path(root))


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error, or one of its causes, means that the disk of ``folder`` is full.

    torch and safetensors report a full disk as errors of their own: these are told by their text and the free space.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(seen)
        if "No space left" in text or "os error 28" in text:
            return True
        if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
            return shutil.disk_usage(folder).free < 2**20
        seen = seen.__cause__ or seen.__context__
    return False


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_same(folder: Path, what: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError, with the values that differ, if a folder was made with other values than those wanted."""
    changed = [f"{key} {there.get(key)!r}, not {value!r}" for key, value in wanted.items() if there.get(key) != value]
    if changed:
        raise ConfigError(
            f"{folder}: holds {what} of other arguments ({'; '.join(changed)}); delete the folder or give another one"
        )
