"""Export a finished stage as a folder that plain transformers or PEFT loads, and push it to the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast import methods, tuners
from holdfast.config.model import ModelConfig
from holdfast.config.run import RunConfig, load_config
from holdfast.data.encode import Encoder
from holdfast.data.encode_apart import encoder_of
from holdfast.deploy.exported import Exported
from holdfast.deploy.exported_stage import find_exported_stage
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.models.gguf import is_gguf
from holdfast.models.kinds import is_seq2seq, sees
from holdfast.models.pretrained import load_saved_tokenizer, readable
from holdfast.models.sight import PROCESSOR_FILES, load_sight
from holdfast.records.read import read_run
from holdfast.records.shapes import read_json
from holdfast.records.trust import require_trust
from holdfast.runner.inputs import model_inputs
from holdfast.runner.reload import check_inputs, find_base
from holdfast.system.files import whole_folder, write_json
from holdfast.system.machine import versions
from holdfast.system.manifest import EXPORT, check, folder_facts

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from holdfast.api.tuner import Tuner

MANIFEST = EXPORT
"""The file that says what an exported folder holds. Another export may replace a folder or repository that has it."""


def export(
    run: Path | str,
    to: Path | str,
    *,
    stage: int | None = None,
    merge: bool = False,
    push_to: str | None = None,
    accept_changes: bool = False,
    trust: bool = False,
) -> Exported:
    """Write a stage's model, or its adapter, with tokenizer, processor, generation settings and a model card.

    Args:
        run: a run's directory.
        to: the folder to write, whole or not at all; it replaces an earlier export there.
        stage: from 1; if None, the last complete one, or the one that the run's gate went back to.
        merge: merge an adapter into its model, so that the folder holds a whole model.
        push_to: the hub name to upload the folder to.
        accept_changes: export an adapter although its base model is no longer that of the run.
        trust: run the code that the run's record names.

    Raises:
        RunDirectoryError: there is no run, it has no complete stage, or a file of it is damaged.
        ConfigError: there is no such stage, the adapter cannot be merged, its base model is not found, ``to`` holds
            something else or cannot be written, or the hub refuses.
    """
    run, to = Path(run), Path(to).resolve()
    finished = read_run(run)
    number, folder = find_exported_stage(finished, stage)
    _check_target(to)
    config = load_config(finished.config)
    require_trust(run, config, trust)
    assert config.tuner is not None, "a run that has begun names its tuner"
    tuner = tuners.build(config.tuner)
    saved = folder / tuner.folder
    check(saved)
    kind = "model" if tuner.folder == "model" else "merged" if merge else "adapter"
    if kind == "merged":
        _check_mergeable(tuner)
    base = find_base(finished, config.model.name, needed=kind != "model")
    pretrained = config.model.model_copy(update={"name": base})
    if kind != "model":
        check_inputs(finished, {"model": model_inputs(pretrained)}, [], accept_changes)
    if kind == "adapter":
        _check_adapter(config.model.name, base, push_to)
    tokenizer = load_saved_tokenizer(saved, RunDirectoryError, config.model.trust_remote_code)
    model_config = _model_config(pretrained, saved if kind == "model" else None)
    sight = load_sight(config.model.model_copy(update={"name": str(saved), "revision": None}), model_config, tokenizer)
    encoder = encoder_of(model_config, tokenizer, sight, max_length=finished.max_length, template=config.data.template)
    settings = _generation_settings(pretrained, saved if kind == "model" else None, model_config, encoder)
    merged = _merged(pretrained, model_config, tuner, saved) if kind == "merged" else None
    exported = Exported(
        run=finished,
        config=config,
        stage=number,
        task=read_json(folder / "stage.json")["task"],
        row=len(finished.tasks) if finished.joint else number,
        base=base,
        tuner=tuner,
        kind=kind,
        chat=encoder.chat,
        seq2seq=is_seq2seq(model_config),
        sees=sees(model_config),
        dtype=None if merged is None else str(merged.dtype).removeprefix("torch."),
        lacks=[*method_lacks(config), *_folder_lacks(config, tuner, kind, base, tokenizer)],
    )
    try:
        _write(exported, to, saved, merged, settings, tokenizer)
    except OSError as error:
        raise ConfigError(f"--to: {to} cannot be written ({error.strerror or error})") from None
    if push_to is not None:
        _push(to, push_to, exported)
    return exported


def _check_target(to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to: {to} is a file; give a folder, or a name that does not exist yet")
    if to.exists() and any(to.iterdir()) and not (to / MANIFEST).exists():
        raise ConfigError(f"--to: {to} holds other files than an earlier export (no {MANIFEST}); choose another folder")


def _model_config(model: ModelConfig, folder: Path | None) -> PretrainedConfig:
    """The configuration of the trained model in a folder; if None, of the base model.

    Raises:
        ConfigError: the base model is not found.
    """
    from transformers import AutoConfig

    from holdfast.models.pretrained import load_model_config

    if folder is None:
        return load_model_config(model)
    with readable(f"{folder}: its config.json cannot be used", RunDirectoryError):
        return AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)


def _generation_settings(
    model: ModelConfig, folder: Path | None, config: PretrainedConfig, encoder: Encoder
) -> GenerationConfig:
    """The model's own settings, with the tokens at which the run's responses end, and the padding token.

    Args:
        folder: the trained model; if None, the settings are the base model's.
        config: of the model.
    """
    from transformers import GenerationConfig

    name, revision = (model.name, model.revision) if folder is None else (str(folder), None)
    try:
        with readable(f"{name}: its generation_config.json cannot be used", RunDirectoryError):
            settings = GenerationConfig.from_pretrained(name, revision=revision)
    except RunDirectoryError as error:
        if not isinstance(error.__cause__, OSError) or (Path(name) / "generation_config.json").exists():
            raise
        settings = GenerationConfig.from_model_config(config)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = sorted({*encoder.stop_ids, *(end for end in ends if end is not None)}) or None
    settings.pad_token_id = encoder.tokenizer.pad_token_id
    if encoder.sight is not None:  # as holdfast.models.sight.never_written
        settings.suppress_tokens = sorted({*(settings.suppress_tokens or ()), encoder.sight.image_token_id})
    settings._from_model_config = False  # or transformers may restore the model's own end tokens
    return settings


def _check_mergeable(tuner: Tuner) -> None:
    if tuner.not_merged:
        raise ConfigError(
            f"--merge: tuner {tuner.name!r} cannot be merged into the model, since {tuner.not_merged}; leave --merge "
            "out to export the adapter"
        )


def _check_adapter(name: str, base: str, push_to: str | None) -> None:
    """Raise ConfigError where nobody could load an adapter onto its base model."""
    if is_gguf(base):
        raise ConfigError(
            f"--merge: PEFT loads no adapter onto a GGUF file ({name}); add --merge to export one model, or convert "
            "the file (holdfast convert) and teach the folder"
        )
    if push_to is not None and Path(base).is_absolute():
        raise ConfigError(
            f"--push-to: the adapter's base model is a folder of this machine ({name}), which nobody else can load; "
            "push one model with --merge, or run on the hub's name of the base model"
        )


def _merged(config: ModelConfig, model_config: PretrainedConfig, tuner: Tuner, adapter: Path) -> PreTrainedModel:
    """The base model with a saved adapter merged into it, by plain PEFT, on the CPU: in float32, and then rounded to
    the data type that the base model's files have, so that the merged model is as large as they are.

    Raises:
        ConfigError: the base model cannot be loaded, or PEFT cannot merge the adapter.
    """
    from holdfast.models.weights import merged_model

    merged = merged_model(config, adapter, f"--merge: tuner {tuner.name!r}")
    stored = getattr(model_config, "dtype", None)  # absent of a GGUF file, whose types no folder has
    return merged if stored is None else merged.to(stored)


def _write(
    exported: Exported,
    to: Path,
    saved: Path,
    merged: PreTrainedModel | None,
    settings: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    from transformers import GenerationConfig

    from holdfast.deploy.model_card import model_card

    if links := [path for path in saved.rglob("*") if path.is_symlink()]:
        raise RunDirectoryError(
            f"{links[0]}: is a link to another file, which would be exported; put a file in its place"
        )
    with whole_folder(to) as partial:
        if merged is None:
            shutil.copytree(saved, partial, dirs_exist_ok=True)
        else:
            merged.generation_config = GenerationConfig()  # the settings are written below, unchanged
            merged.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            for file in (saved / name for name in PROCESSOR_FILES if exported.sees):
                if file.exists():
                    shutil.copyfile(file, partial / file.name)
        if exported.kind == "adapter":
            adapter = read_json(partial / "adapter_config.json")
            if not isinstance(adapter, dict):
                raise RunDirectoryError(f"{saved / 'adapter_config.json'}: is damaged: it is no object")
            write_json(
                partial / "adapter_config.json",
                adapter | {"base_model_name_or_path": exported.base, "revision": exported.config.model.revision},
            )
        settings.to_json_file(partial / "generation_config.json")
        model_card(exported).save(partial / "README.md")
        write_json(
            partial / MANIFEST,
            {
                "kind": exported.kind,
                "stage": exported.stage,
                "task": exported.task,
                "lacks": exported.lacks,
                "versions": versions(),
                "files": folder_facts(partial),
            },
        )


def method_lacks(config: RunConfig) -> list[str]:
    """What the run's methods do at test time: the scores were measured with it, and a plain library does not do it."""
    lines = []
    for named in config.method:
        try:
            method = methods.find(named.name)(**named.options)
        except ConfigError:
            lines.append(f"method {named.name!r} cannot be loaded here, so whether it acts at test time is not known")
            continue
        if method.lacks:
            lines.append(f"method {method.name!r} {method.lacks}; the scores were measured with it")
    return lines


def _folder_lacks(
    config: RunConfig, tuner: Tuner, kind: str, base: str, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """What the folder itself lacks, whatever the methods."""
    model, lines = config.model, []
    if kind == "adapter" and tuner.lacks:
        lines.append(tuner.lacks)
    if kind == "adapter" and Path(base).is_absolute():
        merge = "" if tuner.not_merged else ", or export with --merge"
        lines.append(
            f"the adapter's base model is a folder of this machine, {base}: elsewhere set base_model_name_or_path in "
            f"adapter_config.json{merge}"
        )
    if kind == "adapter" and model.revision is not None:
        lines.append(
            f"the adapter belongs to revision {model.revision!r} of its base model: PEFT's Auto classes take it from "
            "adapter_config.json, other libraries must be told"
        )
    if model.quantization is not None:
        what = "the adapter is merged into weights that are not" if kind == "merged" else "load the base model so, too"
        lines.append(f"the scores were measured on base weights in {model.quantization}: {what}")
    if config.data.template == "plain" and tokenizer.chat_template:
        lines.append(
            "the tokenizer has a chat template, but the run was trained and measured without it (data.template: "
            "plain): ask by plain text, not by chat"
        )
    if model.trust_remote_code:
        lines.append("the model's architecture comes with Python code of its own: loading needs trust_remote_code=True")
    return lines


def _push(folder: Path, name: str, exported: Exported) -> None:
    """Upload an export; a repository is replaced if it is empty or holds an earlier export.

    Raises:
        ConfigError: the repository holds something else, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(name, exist_ok=True)
        there = set(hub.list_repo_files(name)) - {".gitattributes"}
        if there and MANIFEST not in there:
            raise ConfigError(
                f"--push-to: {name} holds other files than an earlier export ({', '.join(sorted(there)[:3])}); choose "
                f"another name; the folder {folder} is written"
            )
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            delete_patterns="*",  # files of an earlier export: an adapter among them would be loaded with the model
            commit_message=f"Stage {exported.stage} ({exported.task})",
        )
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub, the network or a missing token may raise
        raise ConfigError(f"--push-to: {name}: {error}; the folder {folder} is written") from None
