"""Batched greedy generation with transformers, and the mode for measuring a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig

from holdfast.engines.pieces import is_divided
from holdfast.models.batches import Size, by_batch, by_tokens
from holdfast.models.beginnings import Beginnings
from holdfast.models.seq2seq import beginning, prompted
from holdfast.models.sight import never_written

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    eos_token_ids: list[int],
    pad_token_id: int,
    on_batch: Callable[[int, int], None] | None = None,
    on_responses: Callable[[list[int], list[list[int]]], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt greedily, until an end token or ``max_new_tokens``.

    The model's own generation settings (sampling, penalties, suppressed tokens) do not apply, so that a response
    depends on the weights and the prompt alone. Batches hold prompts of similar length, the longest first, and what
    many prompts begin with in common is read once; up to float rounding the responses do not depend on either. Modes,
    settings and random states stay as they were.

    Args:
        model: a language model, with or without adapters.
        prompts: token ids, at least one a prompt.
        max_new_tokens: longest response, in tokens, including its end token.
        batch_size: of the longest prompts, generated together; of shorter ones more, in no more padded tokens.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills short prompts; it is masked, so any id of the vocabulary will do.
        on_batch: called after every batch with (prompts done, all prompts); it may raise to stop.
        on_responses: called before it with the numbers of the batch's prompts and their responses.

    Returns:
        The new tokens of every prompt, in the order of ``prompts``, without the end token.
    """
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=eos_token_ids or None,
        pad_token_id=pad_token_id,
        **beginning(model),
        **never_written(model),
    )
    responses: list[list[int]] = [[] for _ in prompts]
    with inference(model), generation_config(model, greedy):
        beginnings = Beginnings(model, pad_token_id)
        order, common = beginnings.order(prompts, [*map(len, prompts)])
        sizes = [Size(1, n, len(prompt) - n + max_new_tokens) for prompt, n in zip(prompts, common, strict=True)]

        def answers(batch: list[int]) -> list[list[int]]:
            part = [prompts[i] for i in batch]
            if begun := [n for i in batch if (n := common[i])]:
                inputs = beginnings.continued(part, begun, left=True)
                width = inputs["input_ids"].shape[1]
            else:
                asked = prompted(model, part, pad_token_id)
                inputs, width = asked.inputs, asked.width
            tokens = model.generate(**inputs, generation_config=greedy)
            return [until(eos_token_ids, new) for new in tokens[: len(batch), width:].tolist()]

        done = 0
        for batch, new in by_batch(by_tokens(order, sizes, batch_size), answers):
            for i, response in zip(batch, new, strict=True):
                responses[i] = response
            done += len(batch)
            if on_responses is not None:
                on_responses(batch, new)
            if on_batch is not None:
                on_batch(done, len(prompts))
    return responses


def until(ends: list[int], tokens: list[int]) -> list[int]:
    """The tokens before the first of ``ends``."""
    return tokens[: next((k for k, token in enumerate(tokens) if token in ends), len(tokens))]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, without gradients, and restore every module's mode at the end."""
    # FSDP2 reuses buffers between forward passes, and training cannot use buffers made in inference mode.
    without_gradients = torch.no_grad() if is_divided(model) else torch.inference_mode()
    with evaluating(model), without_gradients:
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and restore every module's mode at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's own generation settings, which transformers uses for whatever a call leaves open."""
    former = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    for module, _ in former:
        module.generation_config = config
    try:
        yield
    finally:
        for module, settings in former:
            module.generation_config = settings
