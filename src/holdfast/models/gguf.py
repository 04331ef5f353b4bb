"""GGUF files, as llama.cpp and Ollama use them, where a model's folder or hub name is expected.

transformers reads such a file; quantised weights are computed back (dequantised). Without that they would stay packed,
and could be neither trained nor saved. What quantisation lost stays lost.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import with_config
from typing_extensions import TypedDict

from holdfast.errors import ConfigError, DataError
from holdfast.system.shapes import AS_WRITTEN, of_shape

MAGIC = b"GGUF"


@with_config(AS_WRITTEN)
class Origin(TypedDict):
    """``converted_from`` in a model's config.json: the file's name, its SHA-256, the share of its weights of each
    type."""

    file: str
    sha256: str
    weights: dict[str, float]


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return Path(name).suffix.lower() == ".gguf" and Path(name).is_file()


_read: dict[tuple[Any, ...], Any] = {}


def read_once(name: str | Path, what: Any, read: Callable[[], Any]) -> Any:
    """What is read from a model's folder or hub name; of a GGUF file a copy of what was read first, as long as the file
    stays as it is, since reading its header alone takes seconds.

    Args:
        what: says it apart from other things that are read from the same file.
    """
    if not is_gguf(name):
        return read()
    file = Path(name).resolve()
    key = (what, file, file.stat().st_mtime_ns, file.stat().st_size)
    if key not in _read:
        _read[key] = read()
    return copy.deepcopy(_read[key])


def located(name: str | Path) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a folder, a hub name, or a GGUF file.

    Raises:
        ConfigError: the package ``gguf`` is missing.
        DataError: a file is called GGUF, and is none or not a whole one.
    """
    if not is_gguf(name):
        return str(name), {}
    weight_types(Path(name))
    return str(Path(name).parent), {"gguf_file": Path(name).name}


def weight_types(file: Path) -> dict[str, float]:
    """The share of a GGUF file's weights of each type, such as Q4_1, the most frequent first.

    Raises:
        ConfigError, DataError: as :func:`located`.
    """
    types: dict[str, float] = read_once(file, weight_types, lambda: _weight_types(file))
    return types


def _weight_types(file: Path) -> dict[str, float]:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError("GGUF files are read with the package gguf: pip install 'holdfast[gguf]'") from None
    with file.open("rb") as content:
        begins = content.read(len(MAGIC))
    if begins != MAGIC:
        raise DataError(f"{file}: is no GGUF file, whose first bytes are {MAGIC.decode()}")
    counts: Counter[str] = Counter()
    try:
        for tensor in GGUFReader(file).tensors:
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
    except Exception as error:  # whatever a damaged file leads its reader to
        raise DataError(f"{file}: is no whole GGUF file; download it again") from error
    if not counts:
        raise DataError(f"{file}: holds no weights")
    return {name: round(count / counts.total(), 4) for name, count in counts.most_common()}


def origin(config: Any) -> str | None:
    """What a model's configuration says of the GGUF file that its weights come from, in words; None: nothing."""
    try:
        known = of_shape(Origin, getattr(config, "converted_from", None))
    except ValueError:
        return None
    types = ", ".join(f"{share:.0%} {name}" for name, share in known["weights"].items() if share >= 0.005)
    return f"{known['file']} ({types})"
