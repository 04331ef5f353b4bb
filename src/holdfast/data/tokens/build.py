"""A token file while it is built: parts that are on the disk, a journal of them, and how a killed build goes on."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, with_config
from typing_extensions import TypedDict

from holdfast.data.texts import text_files
from holdfast.errors import ConfigError, DataError
from holdfast.system.files import (
    LOCK,
    PARTIAL,
    append_bytes,
    append_jsonl,
    read_appended,
    refuse_link,
    require_same,
    whole_folder,
    write_json,
    write_jsonl,
)
from holdfast.system.shapes import AS_WRITTEN, Count, Facts, of_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST, TOKENS, TOKENIZER, JOURNAL = "manifest.json", "tokens.bin", "tokenizer", "build.jsonl"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
PART = 2**20  # characters that are tokenised, written and journalled at a time, to the end of a document

logger = logging.getLogger("holdfast")


@dataclass(frozen=True)
class Done:
    """What ``tokens.bin`` holds so far: one line of the journal."""

    read: int = 0  # documents taken from the sources, those without text too
    texts: str = hashlib.sha256().hexdigest()  # SHA-256 of the documents read
    empty: int = 0
    documents: int = 0
    tokens: int = 0
    max_id: int = 0
    sha256: str = hashlib.sha256().hexdigest()  # of tokens.bin


@with_config(AS_WRITTEN)
class _Line(TypedDict):
    """A line of the journal, which :class:`Done` is made from."""

    read: Count
    texts: str
    empty: Count
    documents: Count
    tokens: Count
    max_id: Count
    sha256: str


@with_config(AS_WRITTEN)
class _Domain(TypedDict):
    name: str


@with_config(AS_WRITTEN)
class _Plan(TypedDict):
    """The first line of the journal."""

    dtype: str
    domain: _Domain | None
    sources: list[str]
    column: str
    subset: str | None
    split: str | None
    skip: Count
    at_most: Count | None


@dataclass(frozen=True)
class Part:
    """Documents that are tokenised together, and how many had been read, and how many without text, after them."""

    texts: list[str]
    read: int
    empty: int
    digest: str


class Build:
    """A build under way: ``tokens.bin`` grows by parts, and each line of the journal says how far it is right.

    The journal's first line is the plan: everything of the manifest that is known before the first document is read.
    A part reaches the disk before its line does, so what stands behind it is cut off when the build goes on.

    Attributes:
        done: what is on the disk.

    Raises:
        ConfigError: the folder holds an unfinished build of another plan, or something else.
        DataError: the unfinished build is damaged.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], tokenizer: PreTrainedTokenizerBase):
        self._folder, self._plan = folder, plan
        self.done = _resume(folder, plan) or Done()
        if self.done.read == 0:
            with whole_folder(folder / TOKENIZER) as copy:
                tokenizer.save_pretrained(copy)
        write_jsonl(folder / JOURNAL, [plan, asdict(self.done)])
        tokens = folder / TOKENS
        refuse_link(tokens)
        tokens.touch()
        os.truncate(tokens, self.done.tokens * DTYPES[plan["dtype"]].itemsize)
        with tokens.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256")
        if self._digest.hexdigest() != self.done.sha256:
            raise DataError(f"{tokens}: is damaged; delete the folder {folder} to begin anew")

    def parts(self, texts: Iterator[str]) -> Iterator[Part]:
        """The documents after those that are done, in parts of about ``PART`` characters.

        Raises:
            DataError: the documents that are done are not those of the texts.
        """
        skip, at_most = self._plan["skip"], self._plan["at_most"]
        digest = hashlib.sha256()
        for earlier in islice(texts, self.done.read):
            digest.update(earlier.encode() + b"\0")
        if digest.hexdigest() != self.done.texts:
            raise DataError(
                f"{self._folder}: the first {self.done.read} documents of the sources are not those that this "
                "unfinished build has tokenised; put the old ones back, or delete the folder to begin anew"
            )
        read, empty = self.done.read, self.done.empty
        part, size = list[str](), 0
        last = None if at_most is None else skip + at_most
        while read - empty != last and (text := next(texts, None)) is not None:
            digest.update(text.encode() + b"\0")
            read += 1
            if not text.strip():
                empty += 1
            elif read - empty > skip:
                part.append(text)
                size += len(text)
            if size >= PART:
                yield Part(part, read, empty, digest.hexdigest())
                part, size = [], 0
        yield Part(part, read, empty, digest.hexdigest())

    def append(self, part: Part, ids: np.ndarray) -> None:
        """Write a part's tokens, then its line of the journal."""
        content = ids.tobytes()
        self._digest.update(content)
        append_bytes(self._folder / TOKENS, content, sync=True)
        self.done = Done(
            read=part.read,
            texts=part.digest,
            empty=part.empty,
            documents=self.done.documents + len(part.texts),
            tokens=self.done.tokens + len(ids),
            max_id=max(self.done.max_id, int(ids.max(initial=0))),
            sha256=self._digest.hexdigest(),
        )
        append_jsonl(self._folder / JOURNAL, asdict(self.done), sync=True)

    def finish(self) -> dict[str, Any]:
        """Write the manifest, which makes the folder a token file.

        Raises:
            DataError: there was no text.
        """
        if self.done.documents == 0:
            raise DataError(
                f"{', '.join(self._plan['sources'])}: no text to tokenise among {self.done.read} documents "
                f"({self.done.empty} without text, the first {self._plan['skip']} others skipped)"
            )
        counts = {key: value for key, value in asdict(self.done).items() if key != "read"}
        sources = {"bytes": source_bytes(self._plan), "sources_sha256": source_digest(self._plan)}
        manifest = self._plan | sources | counts
        write_json(self._folder / MANIFEST, manifest)
        (self._folder / JOURNAL).unlink()
        return manifest


def _resume(folder: Path, plan: dict[str, Any]) -> Done | None:
    """The last whole line of the journal of an unfinished build; None where nothing was built yet."""
    if not (folder / JOURNAL).exists():
        others = {path.name for path in folder.iterdir()} - {LOCK, TOKENIZER, TOKENIZER + PARTIAL, JOURNAL + PARTIAL}
        if others:
            raise ConfigError(f"{folder}: is no token file, but holds other files ({', '.join(sorted(others)[:3])})")
        return None
    begun, *lines = _journal(folder)
    done = Done(**{field.name: lines[-1][field.name] for field in fields(Done)})
    if done.read == 0:
        return None
    require_same(folder, "an unfinished build", begun, plan)
    logger.info("%s: goes on after %d documents, %d tokens", folder, done.documents, done.tokens)
    return done


def _journal(folder: Path) -> list[dict[str, Any]]:
    """The plan, and the lines of the parts that are done.

    Raises:
        DataError: the journal is damaged.
    """
    path = folder / JOURNAL
    try:
        plan, *lines = of_shape(Annotated[list[Facts], Field(min_length=2)], read_appended(path))
        of_shape(_Plan, plan)
        of_shape(list[_Line], lines)
    except ValueError as error:
        raise DataError(f"{path}: is damaged: {error}; delete the folder {folder} to begin anew") from None
    return [plan, *lines]


def source_bytes(plan: dict[str, Any]) -> int | None:
    """Size of all source files; None where a source is a dataset."""
    files = _source_files(plan)
    return None if files is None else sum(file.stat().st_size for file in files)


def source_digest(plan: dict[str, Any]) -> str | None:
    """SHA-256 (hexadecimal) over the content of all source files, in order; None where a source is a dataset."""
    files = _source_files(plan)
    if files is None:
        return None
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _source_files(plan: dict[str, Any]) -> list[Path] | None:
    paths = [Path(source) for source in plan["sources"]]
    if plan["subset"] or plan["split"] or not all(path.exists() for path in paths):
        return None
    return [file for path in paths for file in text_files(path)]


def unfinished(folder: Path) -> DataError:
    """Why a folder without a manifest cannot be read, and which command makes or completes it."""
    if not (folder / JOURNAL).exists():
        return DataError(f"{folder}: is no token file: it has no {MANIFEST}; `holdfast lab tokens` makes one")
    plan = _journal(folder)[0]
    options = {
        "tokenizer": folder / TOKENIZER,
        "out": folder,
        "domain": plan["domain"] and plan["domain"]["name"],
        "column": plan["column"] if plan["column"] != "text" else None,
        "subset": plan["subset"],
        "split": plan["split"],
        "skip": plan["skip"] or None,
        "documents": plan["at_most"],
    }
    given = [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
    command = shlex.join(["holdfast", "lab", "tokens", *plan["sources"], *given])
    return DataError(f"{folder}: is unfinished; continue with: {command}")
