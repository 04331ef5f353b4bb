"""What figures need of each test row, in one small file a stage: the responses themselves take far longer to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from holdfast.api.scorer import Scorer
from holdfast.records.shapes import damaged
from holdfast.system import manifest
from holdfast.system.files import json_text, parse_json

FILE = manifest.STATISTICS
"""In a stage's folder: tensors [rows, k], each the statistics of all responses that one scorer scored."""


@dataclass(frozen=True)
class Statistics:
    """Those of one file of responses.

    Attributes:
        scorer: what made them, of :func:`maker`.
        sha256: of the file.
        values: [rows, k], of :meth:`.Scorer.statistics`.
    """

    scorer: str
    sha256: str
    values: NDArray[Any] = field(compare=False)


def maker(scorer: Scorer) -> str:
    """What a scorer's statistics of scored rows depend on: not on its settings, which the scores hold already."""
    return f"{type(scorer).__name__} {scorer.name}/{scorer.version}"


def file_content(found: Mapping[str, Statistics]) -> bytes:
    """The content of the file.

    Args:
        found: by the name of the file of responses, without its ending.
    """
    alike: dict[tuple[str, int], list[str]] = {}
    for name, one in found.items():
        alike.setdefault((one.scorer, one.values.shape[1]), []).append(name)
    tensors = {
        str(i): _narrowed(np.concatenate([found[name].values for name in names]))
        for i, names in enumerate(alike.values())
    }
    files = [
        [scorer, [[name, found[name].sha256, len(found[name].values)] for name in names]]
        for (scorer, _), names in alike.items()
    ]
    return save(tensors, {"files": json_text(files)})


def of_responses(folder: Path, root: Path, scorers: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The statistics in a stage's folder, by the name of the file of responses: of those files alone that are still
    what they were, as the manifest says, and by these scorers.

    Args:
        root: the run's directory.
        scorers: the :func:`maker` of each file's statistics, by the file's name without its ending.

    Raises:
        RunDirectoryError: the file of statistics is damaged.
    """
    path, below = folder / FILE, folder.relative_to(root).as_posix()
    if not path.is_file():
        return {}
    manifest.check(path)
    checksums = manifest.checksums(root, [f"{below}/responses/{name}.jsonl" for name in scorers])
    known, found = dict(zip(scorers, checksums, strict=True)), {}
    try:
        with safe_open(path, "np") as file:
            for i, (scorer, places) in enumerate(parse_json(file.metadata()["files"])):
                values, start = file.get_tensor(str(i)), 0
                for name, sha256, rows in places:
                    if scorers.get(name) == scorer and known[name] == sha256:
                        found[name] = values[start : start + rows]
                    start += rows
    except Exception as error:  # safetensors has errors of its own
        raise damaged(path, f"it cannot be read ({error})") from None
    return found


def _narrowed(values: NDArray[np.float64]) -> NDArray[Any]:
    """The values in the smallest type that holds all of them exactly."""
    with np.errstate(invalid="ignore", over="ignore"):
        for dtype in (np.uint8, np.float32):
            if ((narrow := values.astype(dtype)) == values).all():
                return narrow
    return values
