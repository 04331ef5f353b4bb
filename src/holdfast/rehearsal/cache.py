"""The teacher's cache: what a loss needs of the teacher, computed once, stored on disk and read sample by sample."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field, with_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.api.rows import TokenRow
from holdfast.errors import ConfigError, DataError
from holdfast.losses.margin import classify
from holdfast.models.pictures import is_place
from holdfast.rehearsal.samples import rows_fingerprint
from holdfast.rehearsal.states import RunningMoments, pack
from holdfast.system.files import PARTIAL, read_json, remove_link, write_json
from holdfast.system.progress import Show, silent
from holdfast.system.shapes import AS_WRITTEN, Count, Facts, of_shape

MANIFEST = "manifest.json"
EXTRAS = "extras.safetensors"
FORMAT = 1

logger = logging.getLogger("holdfast")


@with_config(AS_WRITTEN)
class _File(TypedDict):
    bytes: Count
    sha256: str


@with_config(AS_WRITTEN)
class _Manifest(TypedDict):
    format: int
    key: Facts
    samples: Annotated[int, Field(ge=0, lt=2**40)]
    shard_rows: Annotated[int, Field(ge=1, lt=2**40)]
    rows: NotRequired[str]
    files: dict[str, _File]


Compute = Callable[[Sequence[TokenRow]], Sequence[Tensor]]
"""Computes one tensor a row, [tokens, width], of any data type and on any device."""


@dataclass(frozen=True)
class BuildPlan:
    """How a cache is built: how samples are laid out in shards, and which process computes which shards.

    Attributes:
        shard_rows: samples in a shard; so many are in memory at a time.
        batch_rows: samples that are computed together.
        rank: number of this process among those that share the folder.
        world: how many processes share the folder.
        barrier: returns once every process has called it; needed where there are several.
        together: the processes go through the model together, so each computes everything and rank 0 writes.
        show: shows how far it is.
    """

    shard_rows: int = 32
    batch_rows: int = 8
    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] | None = None
    together: bool = False
    show: Show = silent

    def wait(self) -> None:
        """Wait until every process is here."""
        assert self.world == 1 or self.barrier is not None, "several processes need a barrier"
        if self.barrier is not None:
            self.barrier()

    def shards(self, samples: int) -> list[range]:
        """The samples of each shard."""
        starts = range(0, samples, self.shard_rows)
        return [range(start, min(start + self.shard_rows, samples)) for start in starts]


ALONE = BuildPlan()


class TeacherCache:
    """One tensor a sample, in safetensors shards of ``shard_rows`` samples each, and a manifest.

    The manifest holds the key that the tensors were computed for, the fingerprint of the rows, and the size and SHA-256
    of every file. Every file is
    written under a temporary name first, and the manifest last, so a killed build is never taken for a cache; the next
    build continues from its complete shards. Reading copies the bytes of one sample, never of a shard. A folder belongs
    to one run at a time.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self._manifest = manifest
        self._open: dict[str, Any] = {}

    @classmethod
    def open_or_build(
        cls,
        folder: Path,
        key: dict[str, Any],
        rows: Sequence[TokenRow],
        compute: Compute,
        *,
        extras: Mapping[str, Tensor] | None = None,
        plan: BuildPlan = ALONE,
    ) -> TeacherCache:
        """Open the cache in ``folder`` if it was built for ``key`` and these very rows; otherwise build it anew.

        The log says which of the two, and why. Every process calls this with the same arguments but its rank and
        computes its share of the shards. The files do not depend on the number of processes.

        Args:
            key: JSON-able values that the tensors depend on beside the rows: hashes of model and tokenizer, layer, ...
            compute: called without gradient, for at most ``plan.batch_rows`` rows at a time.
            extras: further tensors to store, such as the teacher's head.
            plan: the layout in shards, and this process's share of the work.

        Raises:
            ConfigError: the folder cannot be made.
            DataError: a file of the cache is damaged; the message names it.
        """
        cache = cls._reuse(folder, key, rows, plan.rank)
        if cache is None:

            def of_samples(samples: Sequence[int]) -> Sequence[Tensor]:
                return compute([rows[sample] for sample in samples])

            cache = cls._build(folder, key, rows, of_samples, extras or {}, plan)
        return cache

    def __len__(self) -> int:
        return self._manifest["samples"]

    @property
    def nbytes(self) -> int:
        """Bytes on disk, including the manifest's."""
        return (self.folder / MANIFEST).stat().st_size + sum(file["bytes"] for file in self._manifest["files"].values())

    def read(self, sample: int) -> Tensor:
        """The tensor that ``compute`` gave for a sample, counted from 0, on the CPU."""
        return self._file(_shard(sample // self._manifest["shard_rows"])).get_tensor(str(sample)).clone()

    def read_many(self, samples: Sequence[int]) -> list[Tensor]:
        """:meth:`read` for several samples."""
        return [self.read(sample) for sample in samples]

    def extra(self, name: str) -> Tensor:
        """One of ``extras``, on the CPU."""
        return self._file(EXTRAS).get_tensor(name).clone()

    def verify(self) -> None:
        """Compare every file with the size and SHA-256 in the manifest, as opening a cache does.

        Raises:
            DataError: a file is missing or differs; the message names it.
        """
        for name, expected in self._manifest["files"].items():
            path = self.folder / name
            if not path.exists():
                raise _damaged(path, "it is missing")
            if path.stat().st_size != expected["bytes"]:
                raise _damaged(path, f"it has {path.stat().st_size} bytes, not {expected['bytes']}")
            if _sha256(path) != expected["sha256"]:
                raise _damaged(path, "SHA-256 differs")

    def _file(self, name: str) -> Any:
        """An open file, mapped into memory; its tensors are views on the file's bytes, so copy them before use."""
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, "pt")
        return self._open[name]

    @classmethod
    def _reuse(cls, folder: Path, key: dict[str, Any], rows: Sequence[TokenRow], rank: int) -> TeacherCache | None:
        """The cache in ``folder``, verified; None if there is none, or it has another key or is of other rows."""
        log = logger.info if rank == 0 else logger.debug
        path = folder / MANIFEST
        if not path.exists():
            log("teacher's cache %s: built, as there is none", folder)
            return None
        manifest = _manifest(folder)
        stored, wanted = manifest["key"], _plain(key)
        changed = [] if manifest["format"] == FORMAT else ["format"]
        changed += [] if _rows_of(manifest) == rows_fingerprint(rows) else ["samples"]
        changed += [name for name in wanted | stored if wanted.get(name, ...) != stored.get(name, ...)]
        if changed:
            log(
                "teacher's cache %s: rebuilt, as it was made with another %s",
                folder,
                " and ".join(dict.fromkeys(changed)),
            )
            return None
        cache = cls(folder, manifest)
        cache.verify()
        log("teacher's cache %s: reused, %d samples in %d bytes", folder, len(rows), cache.nbytes)
        return cache

    @classmethod
    def _build(
        cls,
        folder: Path,
        key: dict[str, Any],
        rows: Sequence[TokenRow],
        compute: Callable[[Sequence[int]], Sequence[Tensor]],
        extras: Mapping[str, Tensor],
        plan: BuildPlan,
    ) -> TeacherCache:
        manifest = {"format": FORMAT, "key": _plain(key), "samples": len(rows), "shard_rows": plan.shard_rows}
        manifest["rows"] = rows_fingerprint(rows)
        build = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        shards = plan.shards(len(rows))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the teacher's cache cannot be kept in {folder}: {error.strerror}") from None

        plan.wait()  # until every process has looked for a cache
        if plan.rank == 0:
            complete = _clear(folder, build)
            if complete:
                logger.info("teacher's cache %s: goes on from %d of %d shards", folder, complete, len(shards))
        plan.wait()
        missing = [number for number in range(len(shards)) if not (folder / _shard(number)).exists()]
        plan.wait()
        mine = missing if plan.together else missing[plan.rank :: plan.world]
        with plan.show("the teacher reads its samples") as show:
            for done, number in enumerate(mine, 1):
                tensors = _computed(compute, rows, shards[number], plan.batch_rows)
                if plan.rank == 0 or not plan.together:
                    _write(folder / _shard(number), tensors, build)
                show(done, len(mine))
        if plan.rank == 0 and extras:
            _write(folder / EXTRAS, {name: _copy(tensor) for name, tensor in extras.items()}, build)
        plan.wait()
        if plan.rank == 0:
            paths = [folder / _shard(number) for number in range(len(shards))] + [folder / EXTRAS] * bool(extras)
            files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
            write_json(folder / MANIFEST, manifest | {"files": files})
        plan.wait()
        return cls(folder, read_json(folder / MANIFEST))


def state_cache(
    folder: Path,
    key: dict[str, Any],
    rows: Sequence[TokenRow],
    hidden_states: Compute,
    *,
    multiple: float = 1.0,
    places: bool = False,
    plan: BuildPlan = ALONE,
) -> tuple[TeacherCache, Tensor, Tensor]:
    """GeRe's activation states of all samples, two bits each (arXiv 2508.04676).

    The hidden states of all samples lie on disk until mean and standard deviation of each dimension over all tokens of
    all samples are known. Then each activation is compared with the thresholds low = mean - multiple * std and high =
    mean + multiple * std. So the model is called once.

    Args:
        folder, key, rows, plan: as :meth:`TeacherCache.open_or_build` takes them.
        hidden_states: gives one tensor a row, [tokens, hidden], of any floating type.
        multiple: of the standard deviation; 1 in the paper.
        places: whether the places of pictures count in mean and standard deviation.

    Returns:
        the cache, in which a sample is uint8 [tokens, ceil(hidden / 4)]; :func:`holdfast.rehearsal.states.unpack`
        gives the classes: 0 at low or below, 1 between, 2 at high or above;
        low and high, float32 [hidden], on the CPU.

    Raises:
        ConfigError: the folder cannot be made.
        DataError: a file of the cache is damaged, or a hidden state is not finite.
    """
    key = key | {"kind": "states", "multiple": multiple} | ({"places": True} if places else {})
    on_disk = folder / "hidden"
    cache = TeacherCache._reuse(folder, key, rows, plan.rank)
    if cache is None:

        def finite(batch: Sequence[TokenRow]) -> list[Tensor]:
            return [_finite(states) for states in hidden_states(batch)]

        hidden = TeacherCache.open_or_build(on_disk, key | {"kind": "hidden"}, rows, finite, plan=plan)
        moments = RunningMoments()
        for sample in range(len(rows)):
            states = hidden.read(sample)
            part = RunningMoments()
            part.add(states if places else _of_text(rows[sample], states))
            moments.merge(part)
        low = (moments.mean - multiple * moments.std).float()
        high = (moments.mean + multiple * moments.std).float()

        def classes_of(samples: Sequence[int]) -> list[Tensor]:
            return [pack(classify(states, low, high)) for states in hidden.read_many(samples)]

        cache = TeacherCache._build(folder, key, rows, classes_of, {"low": low, "high": high}, plan)
    plan.wait()
    if plan.rank == 0:
        shutil.rmtree(on_disk, ignore_errors=True)
    return cache, cache.extra("low"), cache.extra("high")


def _of_text(row: TokenRow, states: Tensor) -> Tensor:
    """The hidden states [tokens, hidden] of a row without those at the places of pictures."""
    places = [is_place(token) for token in row["input_ids"]]
    return states[~torch.tensor(places, device=states.device)] if any(places) else states


def cached_rows(folder: Path) -> str | None:
    """The fingerprint of the rows that the cache in ``folder`` is of; None where there is no finished cache.

    Raises:
        DataError: its manifest is none.
    """
    return _rows_of(_manifest(folder)) if (folder / MANIFEST).exists() else None


def _rows_of(manifest: dict[str, Any]) -> str | None:
    """The fingerprint of a cache's rows; caches of 0.1.0 have it in their key alone."""
    return manifest["rows"] if "rows" in manifest else manifest["key"].get("samples")


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        DataError: it is none.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = of_shape(_Manifest, read_json(path))
        shards = [_shard(number) for number in range(-(-manifest["samples"] // manifest["shard_rows"]))]
        if not set(shards) <= manifest["files"].keys() <= {*shards, EXTRAS}:
            raise ValueError("files: must be the shards of all samples")
    except ValueError as error:
        raise DataError(
            f"{path}: is no manifest of a teacher's cache ({error}); delete the folder {folder} to build one there, or "
            "give another folder"
        ) from None
    return manifest


def _shard(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """The key as JSON gives it back."""
    return json.loads(json.dumps(key, allow_nan=False))


def _clear(folder: Path, build: str) -> int:
    """Delete all files but the complete shards of this build; return the number of these."""
    for name in (MANIFEST, EXTRAS):
        (folder / name).unlink(missing_ok=True)
    complete = 0
    for path in folder.glob("shard-*"):
        if path.suffix != PARTIAL and _build_of(path) == build:
            complete += 1
        else:
            path.unlink()
    return complete


def _build_of(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("build")
    except SafetensorError:
        return None


def _computed(
    compute: Callable[[Sequence[int]], Sequence[Tensor]], rows: Sequence[TokenRow], shard: range, batch_rows: int
) -> dict[str, Tensor]:
    """The tensors of one shard, by sample; those of like length are computed together, with little padding."""
    tensors: dict[str, Tensor] = {}
    by_length = sorted(shard, key=lambda sample: len(rows[sample]["input_ids"]), reverse=True)
    for start in range(0, len(by_length), batch_rows):
        samples = by_length[start : start + batch_rows]
        with torch.no_grad():
            computed = compute(samples)
        tensors |= {str(sample): _copy(tensor) for sample, tensor in zip(samples, computed, strict=True)}
    return tensors


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU: a sample is often a view of a padded batch."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(path: Path, tensors: dict[str, Tensor], build: str) -> None:
    """Write a whole file, with the mark of its build."""
    partial = path.with_name(path.name + PARTIAL)
    remove_link(partial)
    save_file(tensors, partial, {"build": build})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path}: is damaged ({why}); delete the folder {path.parent} to rebuild it")


def _finite(states: Tensor) -> Tensor:
    """The hidden states of a sample; DataError if they are not finite."""
    if not torch.isfinite(states).all():
        raise DataError(
            "a hidden state of the model is not finite on a rehearsal sample, so it has no activation states; "
            "a model in float32 or bfloat16 with sound weights is needed"
        )
    return states
