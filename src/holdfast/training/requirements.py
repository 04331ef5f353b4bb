"""What methods need of a trainer's model and rows, checked before a stage is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from holdfast.api.method import Method
from holdfast.api.rows import TokenRow
from holdfast.api.tuner import Tuner
from holdfast.errors import ConfigError
from holdfast.models.head import base
from holdfast.models.kinds import is_seq2seq, sees
from holdfast.training.batches import is_packed, is_preference_batch
from holdfast.training.extra_rows import check_tokens, check_whole


def check_trainable(model: nn.Module) -> None:
    """ConfigError if no parameter of the model is trained."""
    if any(p.requires_grad for p in model.parameters()):
        return
    adapters = getattr(model, "peft_config", None)
    advice = (
        "load the adapter with PeftModel.from_pretrained(..., is_trainable=True)"
        if adapters
        else "set requires_grad of what is to be trained"
    )
    raise ConfigError(f"model: no parameter of it is trainable, so nothing could be learned; {advice}")


def check_learns_stages(methods: Sequence[Method]) -> None:
    """ConfigError if a method learns no stage after another, so that a call of train() would not be its work."""
    for method in methods:
        if method.schedule == "joint":
            raise ConfigError(
                f"method: {method.name!r} learns all tasks at once, and a call of train() learns one; put the rows of "
                "all tasks into one train_dataset and leave method out, or let `holdfast run` do it"
            )
        if method.schedule == "none":
            raise ConfigError(
                f"method: {method.name!r} trains nothing and acts only where `holdfast run` answers test rows; run it "
                "there as a reference, or choose a method that trains, such as 'replay'"
            )


def check_kind(model_config: Any, parts: Sequence[Method | Tuner]) -> None:
    """ConfigError if the model is a sequence-to-sequence one or sees, and a method or tuner does not work with it."""
    for part in parts if is_seq2seq(model_config) else ():
        if part.causal_only:
            raise ConfigError(f"{part.kind} {part.name}: {kind_of(model_config)}, and {part.causal_only}")
    for part in parts if isinstance(model_config, PreTrainedConfig) and sees(model_config) else ():
        if part.text_only:
            raise ConfigError(
                f"{part.kind} {part.name}: the model sees ({model_config.model_type}), and {part.text_only}"
            )


def kind_of(model_config: Any) -> str:
    """What a refusal says of a sequence-to-sequence model."""
    return f"the model is a sequence-to-sequence one ({model_config.model_type})"


def check_methods(methods: Sequence[Method], model: nn.Module, rows: Sequence[TokenRow]) -> None:
    """Check that the model and the task's rows are of the kind that the methods work with.

    Args:
        rows: the task's; the first one is looked at if a method needs rows.

    Raises:
        ConfigError: a method works with causal models alone, and this is none; it goes through the model with rows of
            the next-token loss, and the model has another loss; or it needs the task's rows, and they are not tokens
            with a label for each, or cannot be chosen from.
    """
    check_kind(getattr(base(model), "config", None), methods)
    for method in methods:
        own = (type(method).extra_rows is not Method.extra_rows, type(method).loss_weights is not Method.loss_weights)
        takes_rows = method.needs_rows or any(own)
        if takes_rows and (reason := other_loss(model)):
            raise ConfigError(
                f"method {method.name}: computes next-token losses, but {reason}; a causal language model would do, or "
                "a method that needs no rows, such as si"
            )
    needing = [method for method in methods if method.needs_rows]
    if not needing:
        return
    try:
        with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
            assert not len(rows) or rows[0]
    except ConfigError as error:
        raise ConfigError(f"method {needing[0].name}: {error}") from None


def check_batches(methods: Sequence[Method], first: Callable[[], Any]) -> None:
    """Check that a trainer's batches are of the kind that the methods work with.

    Args:
        first: makes one of the trainer's batches; None if there is none to look at.

    Raises:
        ConfigError: a method works on the task's rows in the batches, or reads the outputs of the task's forward pass,
            and there are none; or it needs rows apart, and they are packed.
    """
    reading = [method for method in methods if reads_outputs(method)]
    on_rows = [method for method in methods if works_on_batches(method)]
    apart = [method for method in methods if method.needs_rows_apart]
    if not reading and not on_rows and not apart:
        return
    batch = first()
    if batch is None:
        return
    for method in on_rows:
        check_tokens(batch, method.name)
        if method.needs_token_batches:
            check_whole([batch], method.name)
    if apart and is_packed(batch):
        raise ConfigError(f"{packed(apart[0])}; turn the trainer's packing off")
    if reading and (is_preference_batch(batch) or not isinstance(batch, Mapping)):
        raise ConfigError(
            f"method {reading[0].name}: reads what the model makes of the task's rows, and this trainer does not hand "
            "that on; a method that changes weights or gradients, or whose rows go beside the task's, would do"
        )


def reads_outputs(method: Method) -> bool:
    """Whether a method reads the outputs of the task's forward pass for terms of its own."""
    return method.reads_outputs and type(method).loss_terms is not Method.loss_terms


def works_on_batches(method: Method) -> bool:
    """Whether a method works on the task's rows within a trainer's batches, or weighs their tokens."""
    return method.needs_token_batches or type(method).loss_weights is not Method.loss_weights


def packed(method: Method) -> str:
    """Why a method refuses rows that share a sequence."""
    return f"method {method.name}: needs every row in a sequence of its own, and several rows share one"


def other_loss(model: nn.Module) -> str:
    """How the loss of a model differs from the next-token loss; empty if it does not, or if nobody knows."""
    inner: Any = base(model)
    if not isinstance(inner, PreTrainedModel):
        return ""
    name = type(inner).__name__
    if is_seq2seq(inner.config):
        return ""
    kind = getattr(inner, "loss_type", None)
    other = kind in LOSS_MAPPING and LOSS_MAPPING[kind] is not ForCausalLMLoss
    return f"the loss of {name} is not one ({kind})" if other else ""
