"""A corpus of a model's own samples: shards on disk, written in order and continued after a kill."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import with_config
from typing_extensions import TypedDict

from holdfast.errors import ConfigError, DataError, Interrupted
from holdfast.models.pretrained import tokenizer_fingerprint
from holdfast.models.sampling import Sampler
from holdfast.rehearsal.request import OwnSample, Request
from holdfast.system.files import (
    LOCK,
    PARTIAL,
    locked_folder,
    read_json,
    read_jsonl,
    require_same,
    whole_folder,
    write_json,
    write_jsonl,
)
from holdfast.system.interrupt import Interrupt
from holdfast.system.shapes import AS_WRITTEN, Count, Positive, of_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST, SETTINGS, TOKENIZER = "manifest.json", "settings.json", "tokenizer"
FORMAT = 1


@with_config(AS_WRITTEN)
class _Sample(TypedDict):
    """A line of a shard."""

    number: Count
    input_ids: list[Count]
    labels: list[int]
    log_prob: float


@with_config(AS_WRITTEN)
class _File(TypedDict):
    rows: Count
    bytes: Count
    sha256: str


@with_config(AS_WRITTEN)
class _Request(TypedDict):
    start: list[Count]


@with_config(AS_WRITTEN)
class _Settings(TypedDict):
    tokenizer: str
    request: _Request


@with_config(AS_WRITTEN)
class _Manifest(TypedDict):
    settings: _Settings
    samples: Positive
    tokens: Positive
    supervised: Positive
    duplicates: Count
    log_prob: float
    files: dict[str, _File]


def write_corpus(
    draw: Sampler,
    request: Request,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    batch_size: int = 64,
    seed: int = 0,
    facts: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write samples of a model into a folder; a finished corpus there is kept, an unfinished one is continued.

    Samples are numbered, and a sample depends on the seed and its number alone. ``batch_size`` of them are drawn
    together and make a shard, ``shard-00000.jsonl`` and so on. A line is an object with ``number``, ``input_ids``,
    ``labels`` (-100 where not drawn) and ``log_prob`` (of all drawn tokens under the model, in nats). A sample that
    equals an earlier one is left out. A kill loses no shard that was written, and the files end up the same.

    Args:
        draw: samples from the model.
        request: what the model is given.
        out: the folder.
        tokenizer: the model's; a copy is written into the folder.
        tokens: the corpus ends with the sample that reaches this number of tokens.
        batch_size: samples that are drawn together.
        seed: of the samples.
        facts: further entries of ``settings`` in the manifest, such as the model's name; all of ``settings`` must be
            the same when an unfinished corpus is continued.
        on_progress: called with (tokens so far, tokens in all) after every shard.

    Returns:
        the manifest, which is written last: ``settings``; ``samples``, ``tokens``, ``supervised`` (drawn tokens),
        ``duplicates`` (left out), ``log_prob`` (sum); ``files``, each with ``rows``, ``bytes`` and ``sha256``.

    Raises:
        ConfigError: the folder holds something else, or a corpus of other settings.
        DataError: nearly all samples are duplicates.
        RunDirectoryError: another process uses the folder, or it cannot be written.
        Interrupted: SIGINT or SIGTERM asked to stop; the same call continues.
    """
    out = Path(out)
    settings = {"format": FORMAT, **(facts or {}), "tokenizer": tokenizer_fingerprint(tokenizer)}
    settings |= {"request": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(request).items()}}
    settings |= {"tokens": tokens, "batch_size": batch_size, "seed": seed}
    with locked_folder(out), Interrupt() as interrupt:
        if (out / MANIFEST).exists():
            manifest = read_manifest(out)
            require_same(out, "a corpus", manifest["settings"], settings)
            return manifest
        _begin(out, settings, tokenizer)
        tally = _Tally(tokens)
        for shard in itertools.count():
            path = out / f"shard-{shard:05d}.jsonl"
            if path.exists():
                for line in read_shard(path):
                    tally.add(line)
            else:
                numbers = range(shard * batch_size, (shard + 1) * batch_size)
                lines = _lines(numbers, request.write(draw, seed, numbers))
                write_jsonl(path, [line for line in lines if tally.add(line)])
            if on_progress:
                on_progress(min(tally.tokens, tokens), tokens)
            if tally.tokens >= tokens:
                break
            drawn = (shard + 1) * batch_size
            if drawn - tally.samples > 1000 + 9 * tally.samples:
                raise DataError(
                    f"{out}: of {drawn} samples only {tally.samples} are different ones; a corpus of {tokens} tokens "
                    "needs longer samples, a higher temperature, or another model"
                )
            if interrupt.requested:
                raise Interrupted(f"{out}: stopped after {tally.tokens} of {tokens} tokens, which are saved")
        files = {path.name: _facts(path) for path in sorted(out.glob("shard-*.jsonl"))}
        write_json(out / MANIFEST, {"settings": settings} | tally.counts() | {"files": files})
        (out / SETTINGS).unlink()
        return read_manifest(out)


class Drawing:
    """How far a corpus is while its shards are drawn, token by token.

    A sample is taken to be as long as can be; where it ends before, more shards are drawn than it seemed.

    Args:
        tokens, batch_size, on_progress: as of :func:`write_corpus`.
    """

    def __init__(self, request: Request, tokens: int, batch_size: int, on_progress: Callable[[int, int], None]):
        self._length, self._shard = request.length, batch_size * request.length
        self._tokens, self._on_progress = tokens, on_progress
        self._before = self._steps = 0

    def on_token(self) -> None:
        """To be called before each token of the samples that are drawn together."""
        whole = min(self._shard, self._tokens - self._before)
        share = min(self._steps, self._length - 1) / self._length
        self._steps += 1
        self._on_progress(self._before + int(whole * share), self._tokens)

    def on_shard(self, done: int, total: int) -> None:
        """The ``on_progress`` of :func:`write_corpus`."""
        self._before, self._steps = done, 0
        self._on_progress(done, total)


def _lines(numbers: Sequence[int], samples: Sequence[OwnSample]) -> list[dict[str, Any]]:
    """The lines of a shard."""
    pairs = zip(numbers, samples, strict=True)
    return [{"number": number} | dict(drawn.row) | {"log_prob": drawn.log_prob} for number, drawn in pairs]


def corpus_files(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Path]:
    """The shards of a finished corpus that hold samples, in order, each verified against the manifest.

    Args:
        tokenizer: the tokenizer that the corpus must have been written with; where absent, any.

    Raises:
        DataError: the folder holds no finished corpus, one of another tokenizer, or a shard is missing or damaged.
    """
    if not (folder / MANIFEST).exists():
        raise DataError(
            f"{folder}: is unfinished; the command that began it continues it"
            if (folder / SETTINGS).exists()
            else f"{folder}: is no corpus that a model wrote: it has no {MANIFEST}; `holdfast replay` writes one"
        )
    manifest = read_manifest(folder)
    written, files = manifest["settings"]["tokenizer"], manifest["files"]
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != written:
        raise DataError(f"{folder}: was written with another tokenizer than the model's; write a corpus of this model")
    for name, expected in files.items():
        if not (folder / name).exists():
            raise DataError(f"{folder / name}: is missing; write the corpus anew")
        if _facts(folder / name) != expected:
            raise DataError(f"{folder / name}: is damaged: it is not what {MANIFEST} says; write the corpus anew")
    return [folder / name for name, facts in files.items() if facts["rows"]]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished corpus; DataError if it is none."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = of_shape(_Manifest, read_json(path))
        if other := [name for name in manifest["files"] if not re.fullmatch(r"shard-\d+\.jsonl", name)]:
            raise ValueError(f"files: {other[0]!r:.60} is no shard")
    except ValueError as error:
        raise DataError(f"{path}: is no manifest of a corpus that a model wrote: {error}") from None
    return manifest


def read_shard(path: Path) -> list[dict[str, Any]]:
    """The samples of a shard; DataError if it is damaged."""
    try:
        lines: list[dict[str, Any]] = of_shape(list[_Sample], read_jsonl(path))
        for number, line in enumerate(lines, start=1):
            if len(line["labels"]) != len(line["input_ids"]) or all(label == -100 for label in line["labels"]):
                raise ValueError(f"line {number}: labels: must have a label a token, and one that was drawn")
    except ValueError as error:
        raise DataError(f"{path}: is damaged: {error}; write the corpus anew") from None
    return lines


class _Tally:
    """Counts of a corpus so far.

    Args:
        enough: tokens after which no further sample counts.

    Attributes:
        drawn: samples up to the last one that counts, including duplicates.
    """

    def __init__(self, enough: int):
        self.enough = enough
        self.samples = self.tokens = self.supervised = self.drawn = 0
        self.log_prob = 0.0
        self._seen: set[bytes] = set()

    def add(self, line: dict[str, Any]) -> bool:
        """Count a sample if it is new and more tokens are needed; return whether it counts."""
        digest = hashlib.blake2b(np.asarray(line["input_ids"], "<i8").tobytes(), digest_size=16).digest()
        if self.tokens >= self.enough or digest in self._seen:
            return False
        self._seen.add(digest)
        self.samples += 1
        self.tokens += len(line["input_ids"])
        self.supervised += sum(label != -100 for label in line["labels"])
        self.log_prob += line["log_prob"]
        self.drawn = line["number"] + 1
        return True

    def counts(self) -> dict[str, Any]:
        """The manifest's counts."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "log_prob": self.log_prob,
            "duplicates": self.drawn - self.samples,
        }


def _begin(out: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Record the settings of a new corpus, or compare them with those of an unfinished one."""
    if (out / SETTINGS).exists():
        require_same(out, "an unfinished corpus", read_json(out / SETTINGS), settings)
    else:
        ours = {LOCK, SETTINGS + PARTIAL, TOKENIZER, TOKENIZER + PARTIAL}
        others = sorted({path.name for path in out.iterdir()} - ours)
        if others:
            raise ConfigError(
                f"{out}: holds other files ({', '.join(others[:3])}); give a folder that does not exist yet"
            )
        with whole_folder(out / TOKENIZER) as folder:
            tokenizer.save_pretrained(folder)
        write_json(out / SETTINGS, settings)


def _facts(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "rows": content.count(b"\n"),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
