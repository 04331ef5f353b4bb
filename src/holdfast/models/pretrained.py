"""Load the configuration and the tokenizer of a pretrained model, and fingerprint the tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.config.model import ModelConfig
from holdfast.errors import ConfigError, UserError
from holdfast.models.gguf import located, read_once
from holdfast.system.files import read_json
from holdfast.system.hub import unreachable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = (".safetensors", ".bin", ".index.json")
"""Endings of what holds weights, or says which files hold them."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


@contextlib.contextmanager
def readable(
    what: str, kind: type[UserError] = ConfigError, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Tell of a damaged file in one message, whatever the parser that meets it may raise.

    Args:
        what: the beginning of the message.
        kind: of the error.
        passing: errors that are about something else, such as a disk that is written to.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        short = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # torch's errors
        if isinstance(error, passing) or short:
            raise
        said = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise kind(f"{what}: {said}") from error


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text; otherwise nothing."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begin = [tokenizer.bos_token_id]
    return begin if full[:1] == begin and bare[:1] != begin else []


def check_place(model: ModelConfig, key: str = "model.name") -> None:
    """Check, without reading it, that a model may lie where its name says.

    Args:
        key: the key that the name comes from, for messages.

    Raises:
        ConfigError: there is no such folder, and the name is none of the hub; or it is a file.
    """
    folder = Path(model.name)
    _, options = located(model.name)
    if folder.is_file() and not options:
        raise ConfigError(f"{key}: {model.name!r} is a file; give the folder that holds the model, or a .gguf file")
    if not folder.exists() and (model.name.startswith((".", "/", "~")) or model.name.count("/") > 1):
        raise ConfigError(f"{key}: there is no folder {model.name!r} (looked from {Path.cwd()})")


def check_tokenizer_files(model: ModelConfig, key: str = "model.name") -> None:
    """Check, as :func:`check_place` does, that a tokenizer lies there; raises as it."""
    check_place(model, key)
    folder = Path(model.name)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{key}: the folder {model.name!r} holds no tokenizer; one of {', '.join(TOKENIZER_FILES)} must be "
            "there, as tokenizer.save_pretrained(folder) writes it"
        )


def check_model_files(model: ModelConfig) -> None:
    """Check, without reading them, that a folder holds all that a model to train is made of.

    Raises:
        ConfigError: as :func:`check_tokenizer_files`; or it holds an adapter, no configuration, or no weights.
    """
    refuse_adapter(model)
    check_tokenizer_files(model)
    folder = Path(model.name)
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        raise ConfigError(f"model.name: the folder {model.name!r} holds no config.json, so it holds no model")
    if not any(file.name.endswith(WEIGHTS) for file in folder.iterdir()):
        raise ConfigError(
            f"model.name: the folder {model.name!r} holds no weights (*.safetensors); model.save_pretrained(folder) "
            "writes them"
        )


def refuse_adapter(model: ModelConfig) -> None:
    """Raise ConfigError if a folder holds an adapter and is to be a model."""
    file = Path(model.name) / "adapter_config.json"
    if file.exists():
        raise ConfigError(is_adapter(model.name, file))


def load_tokenizer(model: ModelConfig, key: str = "model.name") -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from its folder or the hub; one without a padding token pads with end or unknown.

    Args:
        key: the key that the name comes from, for messages.

    Raises:
        ConfigError: there is no such folder or hub name, it holds no tokenizer, or one that is not fast.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(model, key)
    folder = Path(model.name)
    found, options = located(model.name)
    offline = "" if folder.exists() else unreachable()
    try:
        load = partial(AutoTokenizer.from_pretrained, found, **hub_options(model), **options)
        tokenizer = read_once(model.name, AutoTokenizer, load)
    except Exception as error:  # whatever a hub, a disk or a parser may raise
        place = (
            "has a tokenizer that cannot be read"
            if folder.exists()
            else f"is no folder, and no tokenizer of the hub{offline}"
        )
        raise ConfigError(refusal(model.name, error, key) or f"{key}: {model.name!r} {place}: {error}") from None
    with readable(f"{key}: the tokenizer of {model.name!r} cannot be used"):
        check_tokenizer(tokenizer)
    if not tokenizer.is_fast:
        raise ConfigError(f"{key}: {model.name!r} has a slow tokenizer; a tokenizer.json is needed")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{key}: the tokenizer of {model.name!r} has no padding, end or unknown token; name one")
    return tokenizer


def hub_options(model: ModelConfig) -> dict[str, Any]:
    """Options of ``from_pretrained`` that say which files of the hub are meant, and whether their code may run."""
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def load_saved_tokenizer(folder: Path, kind: type[UserError], trust_remote_code: bool = False) -> Any:
    """The tokenizer that holdfast has written into a folder.

    Args:
        kind: of the error that is raised if it cannot be read or used.
    """
    from transformers import AutoTokenizer

    with readable(f"{folder}: its tokenizer cannot be read", kind):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Try a tokenizer that was just loaded, since loading looks at little of it; ValueError, or what it may raise."""
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"model_max_length must be a number, not {tokenizer.model_max_length!r:.60}")
    tokenizer("a")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hexadecimal) over all that decides a text's tokens, which padding and truncation settings do not."""
    if hasattr(tokenizer, "backend_tokenizer"):
        content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The model's transformers configuration.

    Raises:
        ConfigError: there is no such model, it is an adapter, or it is not one that transformers knows.
    """
    from transformers import AutoConfig

    check_place(model)
    refuse_adapter(model)
    folder = Path(model.name)
    absent = "" if folder.exists() else f" (there is no such folder, looked from {Path.cwd()}{unreachable()})"
    with readable(f"model.name: {model.name!r} cannot be used as a model{absent}"):
        found, options = located(model.name)
        load = partial(AutoConfig.from_pretrained, found, **hub_options(model), **options)
        try:
            return read_once(model.name, AutoConfig, load)
        except Exception as error:  # whatever a hub, a disk or a parser may raise
            if (told := refusal(model.name, error) or _hub_adapter(model)) is None:
                raise
            raise ConfigError(told) from None


def is_adapter(name: str, file: Path) -> str:
    """Why an adapter is no model, by its adapter_config.json; a whole model beside it in the folder changes nothing,
    since transformers would load the adapter onto the base that this file names."""
    found = read_json(file)
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    beside = " beside a whole model" if (file.parent / "config.json").exists() else " and not a whole model"
    return (
        f"model.name: {name!r} is an adapter{beside}; merge it into its base{f' ({base})' if base else ''} and give "
        "the merged model: holdfast export RUN --merge, or PEFT's merge_and_unload; or go on with the run that made it"
    )


def _hub_adapter(model: ModelConfig) -> str | None:
    """Why a name of the hub is no model, if it is that of an adapter."""
    from transformers.utils import cached_file

    if Path(model.name).exists():
        return None
    try:
        file = cached_file(model.name, "adapter_config.json", revision=model.revision)
    except OSError:
        return None
    return None if file is None else is_adapter(model.name, Path(file))


def refusal(name: str, error: BaseException, key: str = "model.name") -> str | None:
    """What to do about a model that may not be read as it is: its code is not trusted, or its hub page is closed.

    Returns:
        a message; None where the error is about something else.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if "trust_remote_code=True" in str(error):
        return (
            f"{key}: {name!r} comes with Python code of its own, which runs only if you trust it: read it, then set "
            f"model: {{name: {name}, trust_remote_code: true}}, best with the revision that you have read"
        )
    if any(type(one).__name__ == "GatedRepoError" for one in chain) or "gated repo" in str(error):
        return (
            f"{key}: {name!r} is a gated model of the hub: accept its terms on https://huggingface.co/{name}, then log "
            "in with `hf auth login`, or set HF_TOKEN"
        )
    return None


def hub_commit(model: ModelConfig) -> str | None:
    """The commit of the hub that a model's name and revision lead to; None where that is not known."""
    from transformers.utils import cached_file

    try:
        file = cached_file(model.name, "config.json", revision=model.revision)
    except OSError:
        return None
    folder = None if file is None else Path(file).parent  # huggingface_hub keeps files in snapshots/COMMIT
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None
