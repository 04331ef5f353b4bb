"""Sequence-to-sequence models (T5, BART) in the form of causal ones: the one place that knows the difference.

A row of such a model holds its prompt apart: ``encoder_ids`` is what the encoder reads. ``input_ids`` is what the
decoder reads, the model's start token and the answer, and ``labels`` is as long. So position s predicts token s + 1, as
in a causal model, and losses, likelihoods and methods need not know of the encoder. The model's own labels are these
without the first, and its decoder inputs are these tokens without the last: the answer, shifted right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from holdfast.engines.pieces import gather_own, is_divided
from holdfast.errors import ConfigError
from holdfast.losses.next_token import next_token_nll
from holdfast.models.head import base, with_tensors
from holdfast.models.kinds import is_seq2seq
from holdfast.models.pictures import pictures_in
from holdfast.models.sight import sight_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TASK_TYPES = {False: "CAUSAL_LM", True: "SEQ_2_SEQ_LM"}
"""PEFT's names of the kinds of models, by whether they are sequence-to-sequence."""


def reads_apart(model: Any) -> bool:
    """Whether a model, with or without adapters, is a sequence-to-sequence one."""
    return hasattr(base(model), "config") and is_seq2seq(base(model).config)


def task_type(model: PreTrainedModel) -> str:
    """PEFT's name of the kind of a model."""
    return TASK_TYPES[is_seq2seq(model.config)]


def decoder_start(config: PretrainedConfig) -> int:
    """The token that the decoder begins with.

    Raises:
        ConfigError: the configuration names none.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ConfigError(
            f"model.name: the config.json of this {config.model_type} names no decoder_start_token_id, the token that "
            "the decoder begins with; give its number there"
        )
    return int(start)


def decoder_depth(config: PretrainedConfig) -> int:
    """Blocks of the decoder of a sequence-to-sequence model."""
    depths = (getattr(config, key, None) for key in ("num_decoder_layers", "decoder_layers"))
    return next(depth for depth in (*depths, config.num_hidden_layers) if depth is not None)


def empty_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the encoder reads where there is no prompt: the begin token or, without one, the end token.

    lm-evaluation-harness gives the encoder the same token where it measures the likelihood of a text.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ConfigError("model.name: the tokenizer has no begin or end token for the encoder to read before a text")
    return [token]


def around(tokenize: Callable[..., Any]) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text.

    Args:
        tokenize: called with the text, and with whether special tokens are added; it returns token ids.
    """
    bare, full = tokenize("a", False), tokenize("a", True)
    first = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
    return ([], []) if first is None else (full[:first], full[first + len(bare) :])


def answered_row(prompt: Sequence[int], answer: Sequence[int], start: int | None) -> dict[str, list[int]]:
    """The row of a prompt and an answer to it, whose tokens are supervised.

    Args:
        start: the decoder's start token of a sequence-to-sequence model; None: the model is causal.
    """
    given = list(prompt) if start is None else [start]
    row = {"input_ids": [*given, *answer], "labels": [*[-100] * len(given), *answer]}
    return row if start is None else row | {"encoder_ids": list(prompt)}


def text_row(row: dict[str, Any], start: int, prompt: Sequence[int]) -> dict[str, Any]:
    """The row of a text, as a causal model reads it, for a sequence-to-sequence model: an answer to an empty prompt."""
    return row | {
        "input_ids": [start, *row["input_ids"]],
        "labels": [-100, *row["labels"]],
        "encoder_ids": list(prompt),
    }


def start_of(model: PreTrainedModel | PeftModel) -> int | None:
    """The decoder's start token; None where the model is causal."""
    return decoder_start(base(model).config) if reads_apart(model) else None


def reader(model: Any) -> Any:
    """The part of a model that reads a prompt, without the head: the encoder of a sequence-to-sequence model."""
    return base(model).get_encoder() if reads_apart(model) else base(model).base_model


# --- calls ---


def callable_as_causal(model: Any) -> Any:
    """Let a sequence-to-sequence model be called with batches of its rows; any other model stays as it is.

    ``model(input_ids, encoder_ids, encoder_mask, ...)`` returns the logits of the decoder, [rows, seq, vocab], and
    its hidden states as ``hidden_states``; with ``labels`` of those rows, their mean loss too. Calls without
    ``encoder_ids`` are the model's own.
    """
    if reads_apart(model) and not getattr(model, "_holdfast_reads_apart", False):
        model._holdfast_reads_apart = True
        model.register_forward_pre_hook(_given, with_kwargs=True)
        model.register_forward_hook(_made)
    return model


def _given(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the model's own forward pass. Padding on the right needs no mask in a causal decoder."""
    if kwargs.get("encoder_ids") is None:
        return None
    own = dict(kwargs)
    own.pop("num_items_in_batch", None)
    own["decoder_input_ids"], own["input_ids"] = own["input_ids"], own.pop("encoder_ids")
    own["attention_mask"] = own.pop("encoder_mask", None)
    if own.get("labels") is not None:
        own["labels"] = F.pad(own["labels"][:, 1:], (0, 1), value=-100)
    return args, own


def _made(model: Any, args: tuple[Any, ...], outputs: Any) -> Any:
    states = outputs.get("decoder_hidden_states") if hasattr(outputs, "get") else None
    return outputs if states is None or "hidden_states" in outputs else with_tensors(outputs, hidden_states=states)


def next_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Trainer's ``compute_loss_func``: the mean negative log-likelihood of the step's supervised tokens.

    Args:
        labels: of rows, int64 [rows, seq]; -100 where not supervised.
        num_items_in_batch: supervised tokens of the step; where absent, those of these rows count.
    """
    total, tokens = next_token_nll(outputs.logits, labels)
    return total / (tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def native_rows(batch: Any, start: int | None, pad_token_id: int) -> Any:
    """A batch as transformers' collators make them for sequence-to-sequence models, in the form of rows.

    Args:
        batch: ``input_ids`` and ``attention_mask`` of the encoder, and ``labels`` of the decoder, int64 each, without
            the start token; a batch of another kind stays as it is.
        start: the decoder's start token; None: the model is causal, and the batch stays as it is.
    """
    if start is None or not isinstance(batch, Mapping) or "encoder_ids" in batch or batch.get("labels") is None:
        return batch
    labels, ids = batch["labels"], batch["input_ids"]
    tokens = labels.masked_fill(labels == -100, pad_token_id)
    counted = (labels != -100).flip(1).cumsum(1).flip(1) > 0
    return {
        "input_ids": F.pad(tokens, (1, 0), value=start),
        "attention_mask": F.pad(counted.to(ids.dtype), (1, 0), value=1),
        "labels": F.pad(labels, (1, 0), value=-100),
        "encoder_ids": ids,
        "encoder_mask": batch["attention_mask"] if batch.get("attention_mask") is not None else torch.ones_like(ids),
    }


# --- prompts ---


@dataclass(frozen=True)
class Prompted:
    """Prompts as arguments of ``model.generate``.

    Attributes:
        inputs: a causal model's padded on the left; a sequence-to-sequence model's on the right, since its encoder
            may count positions from the first token on. Where a divided model sees and no prompt shows a picture, a
            last row does, since other processes may have pictures.
        padding: tokens before each prompt in the sequences that it returns.
        width: tokens before the new ones in these.
    """

    inputs: dict[str, Any]
    padding: list[int]
    width: int


def prompted(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]], pad_token_id: int) -> Prompted:
    """Prompts for ``model.generate``, on the model's device.

    Args:
        prompts: token ids, at least one a prompt; of a sequence-to-sequence model, what its encoder reads.
        pad_token_id: fills short prompts; it is masked, so any id of the vocabulary will do.
    """
    device = base(model).device
    if reads_apart(model):
        inputs = encoder_inputs(prompts, pad_token_id, device)
        own = {"input_ids": inputs["encoder_ids"], "attention_mask": inputs["encoder_mask"]}
        return Prompted(own, [0] * len(prompts), 1)
    sight = sight_of(model)
    if sight is not None and is_divided(model) and not any(map(pictures_in, prompts)):
        prompts = [*prompts, sight.blank()]
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[pad_token_id] * p + list(row) for p, row in zip(padding, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding], device=device)
    if sight is not None:
        gather_own(base(model))  # generation looks at pictures before it calls the model
    inputs = {"input_ids": ids} if sight is None else sight.batch(model, ids)
    return Prompted(inputs | {"attention_mask": mask}, padding, width)


def beginning(model: PreTrainedModel | PeftModel, *, forced: bool = True) -> dict[str, int]:
    """The settings of generation by which a sequence-to-sequence model's decoder begins; empty for a causal model.

    Args:
        forced: whether the token that the model's own settings force after the start token is forced, too.
    """
    start = start_of(model)
    if start is None:
        return {}
    token = getattr(base(model).generation_config, "forced_bos_token_id", None) if forced else None
    return {"decoder_start_token_id": start} | ({} if token is None else {"forced_bos_token_id": token})


def encoder_inputs(prompts: Sequence[Sequence[int]], pad_token_id: int, device: Any = None) -> dict[str, Tensor]:
    """``encoder_ids`` and ``encoder_mask`` of prompts, int64 [prompts, longest], padded on the right."""
    width = max(map(len, prompts))
    ids = [[*prompt, *[pad_token_id] * (width - len(prompt))] for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    return {
        "encoder_ids": torch.tensor(ids, device=device, dtype=torch.int64),
        "encoder_mask": torch.tensor(mask, device=device, dtype=torch.int64),
    }
