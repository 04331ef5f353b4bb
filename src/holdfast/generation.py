"""Batched greedy generation with transformers, and the mode in which a model is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig

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
    """Continue every prompt with the likeliest next token, until an end token or ``max_new_tokens``.

    The model's own generation settings (sampling, penalties, suppressed tokens) do not apply, so that a response
    depends on nothing but the weights and the prompt. Batches hold prompts of similar length, longest first; up to
    float rounding the responses do not depend on ``batch_size``. Modes, settings and random states are left as found.

    Args:
        model: a causal language model, with or without adapters.
        prompts: token ids, at least one a prompt.
        max_new_tokens: longest response, in tokens, its end token included.
        batch_size: prompts generated together.
        eos_token_ids: tokens that end a response.
        pad_token_id: fills short prompts on the left; masked, so any id of the vocabulary will do.
        on_batch: called after every batch with the prompts done and all prompts; it may raise to stop.
        on_responses: called before that with the numbers of the batch's prompts and what they are returned.

    Returns:
        The new tokens of every prompt, in the order of ``prompts``, up to and without the end token.
    """
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=eos_token_ids or None,
        pad_token_id=pad_token_id,
    )
    responses: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with inference(model), generation_config(model, greedy):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(prompts[batch[0]])
            padding = [width - len(prompts[i]) for i in batch]
            tokens = model.generate(
                input_ids=torch.tensor(
                    [[pad_token_id] * p + prompts[i] for i, p in zip(batch, padding, strict=True)], device=model.device
                ),
                attention_mask=torch.tensor([[0] * p + [1] * (width - p) for p in padding], device=model.device),
                generation_config=greedy,
            )
            for i, new in zip(batch, tokens[:, width:].tolist(), strict=True):
                end = next((k for k, token in enumerate(new) if token in eos_token_ids), len(new))
                responses[i] = new[:end]
            if on_responses is not None:
                on_responses(batch, [responses[i] for i in batch])
            if on_batch is not None:
                on_batch(start + len(batch), len(prompts))
    return responses


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and records no gradients; after, every module is in its former mode."""
    with evaluating(model), torch.inference_mode():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; after, every module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Inside, ``config`` stands in for the model's own, from which transformers fills whatever a call leaves open."""
    own = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    for module, _ in own:
        module.generation_config = config
    try:
        yield
    finally:
        for module, former in own:
            module.generation_config = former
