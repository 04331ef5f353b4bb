"""Stages that TRL's trainers train: on preferences (DPO, KTO), and on rewarded answers of the model's own (GRPO)."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from holdfast.api.task import Kind
from holdfast.engines.pieces import is_divided
from holdfast.errors import ConfigError, UserError, did_you_mean
from holdfast.models.generation import evaluating
from holdfast.models.head import base
from holdfast.training.frozen_adapters import REFERENCE
from holdfast.training.trainer import continual
from holdfast.tuners.lora_factors import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_COLUMNS = {"dpo": ("ref_chosen_logps", "ref_rejected_logps"), "kto": ("ref_logps", "ref_KL_logps")}
"""Where TRL looks for the likelihoods of the reference."""

NAMES = {"dpo": "DPO", "kto": "KTO", "grpo": "GRPO"}
"""What TRL calls a kind's trainer and its configuration."""

OWN: dict[str, dict[str, str]] = {
    "dpo": {
        "precompute_ref_log_probs": "the reference is the model as the stage began, and is always computed beforehand",
        "sync_ref_model": "the reference is the model as the stage began",
        "max_length": "use data.max_length",
        "truncation_mode": "rows are cut as data.max_length says",
    },
    "kto": {
        "precompute_ref_log_probs": "the reference is the model as the stage began, and is always computed beforehand",
        "max_length": "use data.max_length",
    },
    "grpo": {
        "sync_ref_model": "the reference is the model as the stage began",
        "num_iterations": "a stopped stage could not go on between two steps on the same answers",
        "steps_per_generation": "answers are written for each step, so that a stopped stage goes on exactly",
        "generation_batch_size": "it is training.batch_size",
        "use_vllm": "answers are written by the model that trains",
    },
}
"""Fields of a kind's configuration that a run decides, each with what to do or the reason."""


def trl() -> Any:
    """TRL.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import trl
    except ImportError:
        raise ConfigError("kind: dpo, kto and grpo are trained by TRL: pip install 'holdfast[trl]'") from None
    return trl


def config_class(kind: Kind) -> type[TrainingArguments]:
    """The class of a stage's arguments; raises ConfigError if TRL is needed and not installed."""
    return TrainingArguments if kind == "sft" else getattr(trl(), f"{NAMES[kind]}Config")


def check_options(task: str, kind: Kind, options: Mapping[str, Any]) -> None:
    """Check that the options of a task are fields of its kind's configuration that a run leaves to the user.

    Raises:
        ConfigError: one is not, it is no number where one is needed, or TRL is not installed.
    """
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = {field.name: field for field in dataclasses.fields(config_class(kind)) if field.init}
    known = fields.keys() - shared - OWN[kind].keys()
    for key, value in options.items():
        where = f"task {task!r}: options.{key}"
        if key in OWN[kind]:
            raise ConfigError(f"{where}: cannot be given: {OWN[kind][key]}")
        if key in shared:
            raise ConfigError(f"{where}: belongs to training, for all stages alike (training, training.arguments)")
        if key not in known:
            raise ConfigError(f"{where}: TRL's {NAMES[kind]}Config has no such field{did_you_mean(key, known)}")
        if type(default := fields[key].default) in (int, float) and type(value) not in (int, float):
            raise ConfigError(f"{where}: must be a number, such as {default}, not {value!r:.40}")


def check_mismatched(task: str, args: Any) -> None:
    """Check that a kto stage can give each row the answer of another one of its micro-batch.

    Args:
        args: a KTOConfig.

    Raises:
        ConfigError: a micro-batch has one row, or its rows would not stay together.
    """
    if args.loss_type == "apo_zero_unpaired":  # the loss that has no reference point
        return
    why = f"task {task!r} is of kind kto, which compares each row with the answers of others in its micro-batch"
    if args.per_device_train_batch_size < 2:
        raise ConfigError(f"training.micro_batch_size: {why}; a process needs at least 2 rows of a batch")
    if args.train_sampling_strategy != "sequential":
        raise ConfigError(f"training.arguments.train_sampling_strategy: {why}; leave it out")


def own_arguments(kind: Kind, options: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """What a run sets of a kind's configuration, whose options the user gives."""
    match kind:
        case "sft":
            return {}
        case "grpo":
            return {"max_completion_length": completion_length(options, max_length)}
    return {"precompute_ref_log_probs": True, "max_length": None}


@cache
def trainer_class(kind: Kind) -> Any:
    """TRL's trainer of a kind, continual, of rows that are tokenised already."""
    cls: Any = getattr(trl(), f"{NAMES[kind]}Trainer")

    class StageTrainer(cls):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super()._compute_loss(*args, **kwargs)
            except (ValueError, UnboundLocalError) as error:  # the second is KTO's
                if "loss type" in str(error).lower() or isinstance(error, UnboundLocalError):
                    loss = ", ".join(repr(one) for one in _listed(self.args.loss_type))
                    where = f"task {self._holdfast.task_name!r}: options.loss_type"
                    raise ConfigError(f"{where}: TRL's {NAMES[kind]}Trainer has no {loss}: {error}") from None
                raise

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """A run writes no card into its checkpoints."""

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            """Add the likelihoods of the model as it is, without dropout.

            TRL keeps them in a file that one process alone would see.
            """
            loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
            found: list[list[Tensor]] = []
            with evaluating(self.model), _gathered_as_it_lies(self):
                for batch in self.accelerator.prepare_data_loader(loader):
                    values = [v for v in self.compute_ref_log_probs(self.ref_model, batch) if v is not None]
                    found.append([v.cpu() for v in self.accelerator.gather_for_metrics(values)])
            for column, parts in zip(REFERENCE_COLUMNS[kind], zip(*found, strict=True), strict=False):
                dataset = dataset.add_column(column, torch.cat(parts).tolist())
            return dataset

    class GeneratingTrainer(StageTrainer):
        prompt_tokens: Callable[[str], list[int]]

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [self.prompt_tokens(prompt) for prompt in prompts], None, {}

        def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            """Write answers from random numbers that depend on stage, step and rank alone.

            The answers to a prompt may be divided among the processes, where the same numbers would write them twice.
            """
            seed = f"{self.args.seed}/{self.state.global_step}/{self.accelerator.process_index}"
            with seeded(random.Random(seed)):
                return super()._prepare_inputs(*args, **kwargs)

    return continual(GeneratingTrainer if kind == "grpo" else StageTrainer)


def make_trainer(
    kind: Kind,
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    args: TrainingArguments,
    reward: Callable[..., Any] | None = None,
    prompt_tokens: Callable[[str], list[int]] | None = None,
    **continual_arguments: Any,
) -> Any:
    """The trainer of a stage; the model has the weights that the stage begins with, which are the reference's.

    Args:
        rows: dpo: ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; kto: ``prompt_ids``, ``completion_ids`` and
            ``label``; grpo: ``prompt``, by which the reward and the tokens know the row.
        reward: of grpo.
        prompt_tokens: of grpo: the tokens of a row's prompt.
        continual_arguments: those that :func:`continual` adds.
    """
    from datasets import Dataset

    given: dict[str, Any] = {"model": model, "args": args, "processing_class": copy.deepcopy(tokenizer)}
    if kind == "grpo":
        given["reward_funcs"] = reward
    else:
        given["ref_model"] = _view(base(model))
    if kind == "kto":
        rows = _with_mismatched(rows, args)
    with _without_bars(), _reference_as_it_is(kind):
        try:
            trainer = trainer_class(kind)(train_dataset=Dataset.from_list(list(rows)), **given, **continual_arguments)
        except UserError:
            raise
        except ValueError as error:
            where = f"task {continual_arguments.get('task')!r}: options"
            raise ConfigError(f"{where}: TRL's {NAMES[kind]}Trainer does not take them: {error}") from None
    if kind == "grpo":
        trainer.prompt_tokens = prompt_tokens
        if trainer.ref_model is not None:  # TRL has read it from the model's folder
            trainer.ref_model.load_state_dict(base(model).state_dict())
    else:
        trainer.ref_model = None  # its likelihoods are in the rows
    return trainer


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _view(model: nn.Module) -> nn.Module:
    """An object of its own with the model's modules, so that TRL neither loads a second model nor adds an adapter.

    The classes of FSDP2 cannot be copied.
    """
    view: nn.Module = object.__new__(type(model))
    view.__setstate__(model.__dict__)
    return view


@contextmanager
def _reference_as_it_is(kind: Kind) -> Iterator[None]:
    """Inside, TRL does not prepare the reference for an engine, which has its modules already."""
    if kind == "grpo":
        yield
        return
    module = sys.modules[getattr(trl(), f"{NAMES[kind]}Trainer").__module__]
    ours = {"prepare_deepspeed": _as_it_is, "prepare_fsdp": _as_it_is, "hash_module": lambda model: ""}
    before = {name: getattr(module, name) for name in ours}
    try:
        for name, function in ours.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


@contextmanager
def _gathered_as_it_lies(trainer: Any) -> Iterator[None]:
    """Inside, TRL does not gather weights that ZeRO-3 will divide when training begins."""
    config = getattr(trainer.args, "hf_deepspeed_config", None)
    if config is None or is_divided(trainer.model):
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def _as_it_is(model: nn.Module, accelerator: Any) -> nn.Module:
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, TRL shows no bar of its own for the reference's likelihoods."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _with_mismatched(rows: Sequence[Mapping[str, Any]], args: TrainingArguments) -> list[dict[str, Any]]:
    """KTO's rows in random order, each with the answer of another prompt of its micro-batch (the paper's section 3.3).

    TRL's KTOTrainer reads them in this order, since the reference point of a batch is estimated from these answers.
    """
    mixed = random.Random(f"{args.seed}/order").sample(list(rows), len(rows))
    size, result = args.per_device_train_batch_size, []
    for start in range(0, len(mixed), size):
        batch = mixed[start : start + size]
        result += [
            {**row, "KL_completion_ids": batch[number - 1]["completion_ids"]} for number, row in enumerate(batch)
        ]
    return result


@contextmanager
def as_before(model: Any) -> Iterator[None]:
    """Inside, a trainer of TRL works with a model; afterwards, what it has changed beside the weights is as it was.

    TRL replaces the forward pass, takes dropout out and changes the configuration, which the next stage would keep
    until it were stopped and went on. An adapter that it keeps as grpo's reference is removed.
    """
    inner: Any = base(model)
    forward = vars(inner).get("forward")
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    configs = [config for config in (inner.config, getattr(inner, "generation_config", None)) if config is not None]
    before, tags = [dict(vars(config)) for config in configs], vars(inner).get("model_tags")
    try:
        yield
    finally:
        if REFERENCE in getattr(model, "peft_config", {}):
            model.delete_adapter(REFERENCE)
            del model._holdfast_reference
        for name, value in (("forward", forward), ("model_tags", tags)):
            if value is not None:
                setattr(inner, name, value)
            elif name in vars(inner):
                delattr(inner, name)
        for module, p in dropouts:
            module.p = p
        for config, values in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(values)


def completion_length(options: Mapping[str, Any], max_length: int) -> int:
    """Tokens of the longest answer that the model writes while a grpo stage trains.

    Where it is not said, it is TRL's default, but no more than half of ``max_length``, since prompts need room, too.
    """
    return _number(options, "max_completion_length") or min(_default("max_completion_length"), max_length // 2)


def generations(options: Mapping[str, Any]) -> int:
    """Answers to each prompt in a grpo stage; TRL's default where not said."""
    return _number(options, "num_generations") or _default("num_generations")


def _number(options: Mapping[str, Any], name: str) -> int | None:
    value = options.get(name)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ConfigError(f"options.{name}: must be a whole number above 0, not {value!r:.40}")
    return value


def _default(name: str) -> int:
    [field] = [one for one in dataclasses.fields(config_class("grpo")) if one.name == name]
    assert isinstance(field.default, int)
    return field.default
