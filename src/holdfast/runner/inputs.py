"""Fingerprints of what a run's numbers depend on beside its tasks' rows: models, texts and code."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.api.method import Method
from holdfast.config.model import ModelConfig
from holdfast.config.run import RUN
from holdfast.data.tokens.build import MANIFEST as TOKENS_MANIFEST
from holdfast.data.tokens.build import TOKENS
from holdfast.models.gguf import is_gguf
from holdfast.models.pretrained import TOKENIZER_FILES, hub_commit
from holdfast.models.sight import PROCESSOR_FILES
from holdfast.records.inputs import ROWS, Inputs
from holdfast.scoring.reward import reward_function
from holdfast.system.manifest import file_facts, folder_facts

if TYPE_CHECKING:
    from holdfast.runner.setup import Setup

TOKENIZER_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def run_inputs(setup: Setup) -> Inputs:
    """The fingerprints of a run."""
    config = setup.config
    general = {
        f"general ability {one.name}": {
            "its texts or questions": _digest(
                [
                    one.kind,
                    one.texts,
                    one.questions,
                    one.shown,
                    one.by,
                    one.max_new_tokens,
                    one.harness and asdict(one.harness),
                    *([one.rows] if one.rows else []),
                    *([[[picture.number for picture in shown] for shown in one.pictures]] if one.pictures else []),
                ]
            ),
            ROWS: str(len(one.texts) + len(one.questions) + len(one.rows)),
        }
        for one in setup.general
    }
    similarity = config.evaluation.similarity_model
    if similarity is not None and Path(similarity).is_dir():
        general["evaluation.similarity_model"] = path_inputs(Path(similarity))
    return {
        "model": model_inputs(config.model),
        "tokenizer": tokenizer_inputs(config.model),
        **({} if setup.encoder.sight is None else {"processor": processor_inputs(config.model)}),
        **general,
        **_by_run(method_inputs(setup.methods), config.output),
        **reward_inputs(task.reward for task in setup.stream.tasks),
        **code_inputs([*setup.methods, setup.tuner, *(setup.scorers[task.metric] for task in setup.stream.tasks)]),
    }


def _by_run(inputs: Inputs, output: str) -> Inputs:
    """Inputs whose files in the run's own directory are named from there, so that it can be moved."""
    inside = f"{output}/"
    return {
        what: {RUN + part.removeprefix(output) if part.startswith(inside) else part: sha for part, sha in parts.items()}
        for what, parts in inputs.items()
    }


def model_inputs(model: ModelConfig) -> dict[str, str]:
    """The SHA-256 of each file of a model's folder that its outputs depend on, or of a GGUF file; of a hub model, its
    commit."""
    folder = Path(model.name)
    if is_gguf(folder):
        return {"weights and tokenizer": file_facts(folder)["sha256"]}
    if not folder.is_dir():
        commit = hub_commit(model)
        return {"commit on the hub": commit} if commit else {}
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    configs = [folder / name for name in ("config.json", "generation_config.json", "adapter_config.json")]
    code = [*folder.glob("*.py")] if model.trust_remote_code else []
    facts = folder_facts(folder, sorted(path for path in [*weights, *configs, *code] if path.is_file()))
    return {name: known["sha256"] for name, known in facts.items()}


def tokenizer_inputs(model: ModelConfig) -> dict[str, str]:
    """The SHA-256 of each file of a model's folder that makes its tokenizer; a hub model's commit covers them.

    What a tokenizer gives also depends on the libraries' versions, which are compared by themselves.
    """
    folder = Path(model.name)
    files = [folder / name for name in (*TOKENIZER_FILES, *TOKENIZER_SETTINGS)]
    facts = folder_facts(folder, sorted(file for file in files if file.is_file()))
    return {name: known["sha256"] for name, known in facts.items()}


def processor_inputs(model: ModelConfig) -> dict[str, str]:
    """The SHA-256 of each file that says how a model reads pictures; a hub model's commit covers them."""
    files = [Path(model.name, name) for name in PROCESSOR_FILES]
    facts = folder_facts(Path(model.name), [file for file in files if file.is_file()])
    return {name: known["sha256"] for name, known in facts.items()}


def method_inputs(methods: Iterable[Method]) -> Inputs:
    """The files and folders that methods' options name; a dataset of the hub has no fingerprint here."""
    inputs: Inputs = {}
    for method in methods:
        for option in method.inputs:
            name = getattr(method.options, option, None)
            if isinstance(name, str) and Path(name).exists():
                inputs[f"method {method.name}: {option}"] = path_inputs(Path(name))
    return inputs


def path_inputs(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of each file in a folder; of a token file, that of its manifest, which has its own."""
    if path.is_file():
        return {str(path): file_facts(path)["sha256"]}
    if (path / TOKENS).exists():
        return {str(path / TOKENS_MANIFEST): file_facts(path / TOKENS_MANIFEST)["sha256"]}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return {str(path / name): known["sha256"] for name, known in folder_facts(path, files).items()}


def code_inputs(extensions: Iterable[object]) -> Inputs:
    """The file of each method, tuner and scorer that is not holdfast's own; of one in a notebook or script, its class.

    The script itself may change from one start to the next, as it does where a stream grows.
    """
    inputs: Inputs = {}
    for cls in {type(extension) for extension in extensions}:
        if cls.__module__.partition(".")[0] == "holdfast":
            continue
        what = f"{getattr(cls, 'kind', 'code')} {getattr(cls, 'name', cls.__name__)}"
        try:
            if cls.__module__ == "__main__":
                inputs[what] = {"its class": _digest(inspect.getsource(cls))}
            else:
                file = Path(inspect.getfile(cls))
                inputs[what] = {file.name: file_facts(file)["sha256"]}
        except (OSError, TypeError):  # it was typed in, and stands in no file
            continue
    return inputs


def reward_inputs(rewards: Iterable[str | None]) -> Inputs:
    """The file of each reward function that is not holdfast's own."""
    inputs: Inputs = {}
    for name in rewards:
        if name not in (None, "exact_match"):
            file = inspect.getsourcefile(inspect.unwrap(reward_function(name)))
            if file is not None:
                inputs[f"reward {name}"] = {Path(file).name: file_facts(Path(file))["sha256"]}
    return inputs


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
