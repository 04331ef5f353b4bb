"""Checkpoints of InternLM2, Baichuan 2 and Baichuan as plain Llama checkpoints, without running their code.

These families are Llama with other names and packed projections. The conversion reads config.json, the weights,
tokenizer.model and the JSON files of the tokenizer and of generation; it imports no Python file of a checkpoint.

Sources: modeling_internlm2.py and configuration_internlm2.py (Cai et al., 2024, arXiv 2403.17297) and
modeling_baichuan.py with generation_utils.py (Yang et al., 2023, arXiv 2309.10305), as the models' folders hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import ConfigError, DataError
from holdfast.models.convert.families import DERIVED, Part, find_family
from holdfast.models.convert.tokenizer import convert_tokenizer, read_settings
from holdfast.models.pretrained import readable
from holdfast.system.files import whole_folder, write_json
from holdfast.system.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
SHARD_BYTES = 2 * 2**30  # of one file of the target, at most, unless a single tensor is larger


def convert(source: Path, target: Path, progress: Progress | None = None) -> Path:
    """Write a checkpoint of one of the families as a folder that transformers loads as Llama.

    Weights keep their data type. They are read tensor by tensor and written in files of at most ``SHARD_BYTES``, so
    about one such file is in memory at a time. The target is written whole or not at all.

    Args:
        source: a folder with config.json, tokenizer.model and weights, in one file or several, as safetensors or as
            pytorch_model*.bin.
        target: a folder that does not exist yet.

    Returns:
        the target.

    Raises:
        ConfigError: the target exists, or the source is no model that Llama can express.
        DataError: a file of the source is missing or broken, or the weights do not fit config.json.
    """
    if target.exists():
        raise ConfigError(f"{target}: exists already; name a folder that does not")
    failed = f"{source}: cannot be converted"
    with readable(failed, DataError):
        config = read_settings(source / "config.json", required=True)
        parts, llama = find_family(config, source)
        files = _weight_files(source)
        _check(files, parts, source)
        tokenizer = convert_tokenizer(source, config)
        generation = read_settings(source / "generation_config.json")
    with readable(failed, DataError, passing=(OSError,)), whole_folder(target) as folder:
        _write_weights(files, parts, folder, progress or Progress(quiet=True))
        llama.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        plain = {k: v for k, v in generation.items() if k not in ("user_token_id", "assistant_token_id")}
        if plain:
            write_json(folder / "generation_config.json", plain)
    return target


# --- weights ---


def _weight_files(source: Path) -> list[Path]:
    """The files of a checkpoint's weights; of several formats the one that transformers prefers."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (source / name).exists():
            return [source / name]
        index = source / f"{name}.index.json"
        if index.exists():
            files = sorted({source / file for file in read_settings(index)["weight_map"].values()})
            missing = [file.name for file in files if not file.exists()]
            if missing:
                raise DataError(f"{index}: names files that are not there: {_some(missing)}")
            return files
    raise DataError(
        f"{source}: holds no weights; model.safetensors or pytorch_model.bin, or an index of either, is read"
    )


def _tensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """The name, the shape and a reading function of each tensor in a file.

    Raises:
        DataError: the file is broken, or pickled with more than tensors in it.
    """
    import pickle

    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    yield name, tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name)
        else:
            for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
                if not isinstance(tensor, torch.Tensor):
                    raise RuntimeError(f"{name!r} is no tensor but {type(tensor).__name__}")
                yield name, tuple(tensor.shape), partial(torch.Tensor.detach, tensor)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as weights: {reason}") from None


def _check(files: list[Path], parts: dict[str, Part], source: Path) -> None:
    """DataError if the names or shapes of the weights are not those that config.json implies."""
    shapes = {name: shape for path in files for name, shape, _ in _tensors(path)}
    missing = [name for name, part in parts.items() if part.targets and name not in shapes]
    extra = [name for name in shapes if name not in parts and not DERIVED.search(name)]
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(part.shape)}"
        for name, part in parts.items()
        if name in shapes and shapes[name] != part.shape
    ]
    complaints = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("not known", extra), ("of another shape", wrong))
        if names
    ]
    if complaints:
        raise DataError(f"{source}: the weights are not those that config.json says; {'; '.join(complaints)}")


def _write_weights(files: list[Path], parts: dict[str, Part], folder: Path, progress: Progress) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    size = total = done = 0
    needed = sum(bool(part.targets) for part in parts.values())

    def write() -> None:
        save_file(waiting, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    with progress.bar("convert") as bar:
        for path in files:
            for name, _, read in _tensors(path):
                if name not in parts or not parts[name].targets:
                    continue
                for target, tensor in zip(parts[name].targets, parts[name].split(read()), strict=True):
                    if waiting and size + tensor.nbytes > SHARD_BYTES:
                        write()
                        size = 0
                    waiting[target] = tensor.contiguous()
                    size += tensor.nbytes
                    total += tensor.nbytes
                done += 1
                bar.update(done, total=needed)
        write()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
