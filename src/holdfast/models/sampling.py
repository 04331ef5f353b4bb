"""Batched sampling from a language model, one token of every row at a time, with a preallocated cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor
from transformers.cache_utils import CacheLayerMixin

from holdfast.errors import ConfigError, DataError
from holdfast.models.cache import cache_name, has_plain_decoder
from holdfast.models.generation import generation_config, inference
from holdfast.models.head import base, hidden_only, logits_of
from holdfast.models.seq2seq import Prompted, beginning, prompted, reads_apart
from holdfast.models.sight import never_written
from holdfast.system.device import NO_FLOAT64

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BLOCK = 256  # tokens of the vocabulary whose probabilities are summed together


@dataclass(frozen=True)
class Samples:
    """What :func:`sample` drew.

    Attributes:
        tokens: the new tokens of each prompt, including a stop token.
        log_probs: log-probability of each prompt's new tokens together under the model, in nats.
        hidden: if asked for, the last hidden states, after the final norm, of prompt and new tokens as they were
            computed: [tokens - 1, hidden] each, in the model's data type; the last token is no input. Those of a
            sequence-to-sequence model are of the decoder's start token and new tokens.
    """

    tokens: list[list[int]]
    log_probs: list[float]
    hidden: list[Tensor]


class Sampler(Protocol):
    """:func:`sample` with a given model."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        seed: int | str,
        numbers: Sequence[int],
        temperature: float = 1.0,
        stop_token_ids: Collection[int] = (),
        hidden: bool = False,
    ) -> Samples:
        """Continue every prompt, as :func:`sample` does."""


def sample(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    seed: int | str,
    numbers: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token_ids: Collection[int] = (),
    pad_token_id: int = 0,
    hidden: bool = False,
    use_cache: bool = True,
    on_token: Callable[[], None] | None = None,
) -> Samples:
    """Continue every prompt with tokens drawn from softmax(logits / temperature), all prompts in one batch.

    The tokens drawn for a prompt depend on the seed, its number, the prompt and the weights; up to float rounding they
    do not depend on the other prompts. The model's own generation settings do not apply. Modes, settings and random
    states stay as they were.

    A decoder with ordinary attention and a head is stepped below the head, which is cheapest; any other model (PEFT's
    prompts, other caches) goes through ``model.generate``.

    Args:
        model: a language model, with or without adapters.
        prompts: token ids, at least one a prompt; of a sequence-to-sequence model, what its encoder reads.
        max_new_tokens: most tokens to draw for a prompt, or for each.
        seed: of the choices.
        numbers: one number a prompt; 0, 1, ... where absent.
        temperature: above 0.
        top_p: draw from the likeliest tokens that have this much probability together.
        stop_token_ids: tokens that end a sample; without any, each sample has ``max_new_tokens``.
        pad_token_id: fills short prompts; it is masked, so any id of the vocabulary will do.
        hidden: whether to return the hidden states.
        use_cache: False reads the whole row again for every token, for models without a cache.
        on_token: called before each token; it may raise, which ends the sampling.

    Raises:
        ConfigError: the temperature is not above 0.
        DataError: the model's logits are not finite.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature: {temperature} cannot divide logits; it must be above 0")
    if not prompts:
        return Samples([], [], [])
    asked = prompted(model, prompts, pad_token_id)
    ids, mask = asked.inputs["input_ids"], asked.inputs["attention_mask"]
    added = [0] * (len(ids) - len(prompts))
    chosen = [*(range(len(prompts)) if numbers is None else numbers), *added]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    draw = Draw(_uniform(seed, chosen, max(limits), ids.device), temperature, on_token, top_p)
    stops = sorted(stop_token_ids)
    with inference(model):
        if use_cache and has_plain_decoder(model) and _has_known_head(model, ids[:1], mask[:1]):
            tokens, states = _steps(model, ids, mask, draw, limits, stops, hidden)
        else:
            tokens, states = _generate(model, asked, draw, stops, hidden, pad_token_id, use_cache)
    log_probs = torch.cat(draw.log_probs, dim=1).cpu()
    if not torch.isfinite(log_probs).all():
        raise DataError("the model's logits are not finite, so nothing can be sampled from it")
    drawn = tokens[: len(prompts), asked.width :].tolist()
    new = [_until_stop(row[:n], stops) for row, n in zip(drawn, limits, strict=True)]
    sums = [float(row[: len(one)].sum()) for row, one in zip(log_probs, new, strict=False)]
    if states is None:
        return Samples(new, sums, [])
    inputs = [row[p : asked.width + len(one) - 1] for row, p, one in zip(states, asked.padding, new, strict=False)]
    return Samples(new, sums, inputs)


class Draw:
    """Draws the next token of each row by inverting the cumulative distribution with one uniform number.

    Args:
        uniform: float64 [rows, steps], in [0, 1).
        on_token: called before each draw.
        top_p: draw from the likeliest tokens that have this much probability together.

    Attributes:
        log_probs: of the drawn tokens under softmax(logits), float64 [rows, 1] a step.
    """

    def __init__(
        self, uniform: Tensor, temperature: float, on_token: Callable[[], None] | None = None, top_p: float = 1.0
    ):
        self.uniform, self.temperature, self.steps, self.top_p = uniform, temperature, uniform.shape[1], top_p
        self.on_token = on_token
        self.log_probs: list[Tensor] = []

    def __call__(self, logits: Tensor) -> Tensor:
        """The next tokens: logits, float32 [rows, vocab] -> int64 [rows, 1]."""
        if self.on_token is not None:
            self.on_token()
        device = logits.device
        logits = logits.to(self.uniform.device)
        plain = self.temperature == 1 and self.top_p == 1
        p = (logits if plain else logits / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # the likeliest one always stays
            p = torch.zeros_like(p).scatter(-1, order, ordered * (before < self.top_p))
        short = -p.shape[-1] % BLOCK
        blocks = (F.pad(p, (0, short)) if short else p).unflatten(-1, (-1, BLOCK))
        up_to = blocks.sum(-1).double().cumsum(-1)  # block by block: little rounding, and fast sums
        target = self.uniform[:, len(self.log_probs), None] * up_to[:, -1:]
        block = _first_beyond(up_to, target)
        inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)
        token = block * BLOCK + _first_beyond(inside, target - F.pad(up_to, (1, 0)).gather(1, block))
        token.clamp_(max=logits.shape[-1] - 1)  # logits that are not finite give no token
        log_p = p.gather(1, token).log() if plain else logits.gather(1, token) - logits.logsumexp(-1, keepdim=True)
        self.log_probs.append(log_p.double())
        return token.to(device)


def _first_beyond(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first entry of each row [rows, entries] that exceeds the row's target [rows, 1]; its weight is never 0.

    The target may lie at the end of a row or beyond, where two sums were rounded differently; it is then lowered.
    """
    top = cumulative[:, -1:]
    below = torch.minimum(target, top.nextafter(torch.zeros_like(top)))
    return torch.searchsorted(cumulative, below, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _uniform(seed: int | str, numbers: Sequence[int], steps: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed and the row's number alone, float64 [rows, steps].

    They lie on the device, or on the CPU if it holds no float64.
    """
    rows = []
    for number in numbers:
        digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        rows.append(generator.random(steps))
    drawn = torch.from_numpy(np.stack(rows))
    return drawn if device.type in NO_FLOAT64 else drawn.to(device)


def _steps(
    model: PreTrainedModel | PeftModel,
    ids: Tensor,
    mask: Tensor,
    draw: Draw,
    limits: list[int],
    stops: list[int],
    hidden: bool,
) -> tuple[Tensor, Tensor | None]:
    """Step the decoder and its head.

    Returns:
        tokens [rows, width + new ones], and the hidden states of all but the last, if asked for.
    """
    inner = base(model)
    decoder = inner.base_model
    rows, width = ids.shape
    length = width + draw.steps
    cache = Cache(layers=[_Preallocated(length - 1) for _ in DynamicCache(config=inner.config).layers])
    cache_argument = cache_name(decoder)
    assert cache_argument is not None, "has_plain_decoder has looked"
    padded = not bool(mask.all())
    mask = F.pad(mask, (0, draw.steps), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0) if padded else torch.arange(length, device=ids.device)[None]
    tokens = F.pad(ids, (0, draw.steps))
    ending, most = torch.tensor(stops, device=ids.device), torch.tensor(limits, device=ids.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    states = None
    first = 0
    for last in range(width, length):
        part = decoder(
            input_ids=tokens[:, first:last],
            position_ids=positions[:, first:last],
            attention_mask=mask[:, :last] if padded else None,
            use_cache=True,
            **{cache_argument: cache},
        ).last_hidden_state
        if hidden:
            if states is None:
                states = part.new_empty(rows, length - 1, part.shape[-1])
            states[:, first:last] = part
        tokens[:, last : last + 1] = draw(logits_of(model, part[:, -1]))
        first = last
        if stops:
            ended |= torch.isin(tokens[:, last], ending) | (most <= last + 1 - width)
            if bool(ended.all()):
                break
    return tokens[:, : last + 1], states


class _Preallocated(CacheLayerMixin):
    """Keys and values in memory that is allocated once.

    It returns a view on the filled part, so that a step needs no mask; transformers' own static layer returns all.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, length: int):
        super().__init__()
        self.length, self.seen = length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            part.new_empty(*part.shape[:2], self.length, part.shape[-1]) for part in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.seen = self.seen, self.seen + key_states.shape[2]
        self.keys[:, :, start : self.seen] = key_states
        self.values[:, :, start : self.seen] = value_states
        return self.keys[:, :, : self.seen], self.values[:, :, : self.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.length


def _has_known_head(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> bool:
    """Whether the model's logits are what its head's layer gives, scaled and soft-capped as its configuration says."""
    outputs = model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **hidden_only(model)
    )
    logits = outputs.logits[:, -1].float()
    found = logits_of(model, outputs.hidden_states[-1][:, -1])
    return found.shape == logits.shape and bool((found - logits).norm() <= 0.05 * logits.norm())


def _generate(
    model: PreTrainedModel | PeftModel,
    asked: Prompted,
    draw: Draw,
    stops: list[int],
    hidden: bool,
    pad_token_id: int,
    use_cache: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_steps`, through ``model.generate``, for any model that has it."""
    settings = GenerationConfig(
        max_new_tokens=draw.steps,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        eos_token_id=stops or None,
        pad_token_id=pad_token_id,
        return_dict_in_generate=True,
        output_hidden_states=hidden,
        **beginning(model, forced=False),
        **never_written(model),
    )
    with generation_config(model, settings):
        output = model.generate(**asked.inputs, generation_config=settings, logits_processor=[_Drawn(draw)])
    if not hidden:
        return output.sequences, None
    steps = output.decoder_hidden_states if reads_apart(model) else output.hidden_states
    first, *rest = (states[-1] for states in steps)
    return output.sequences, torch.cat([first[:, -asked.width :], *(states[:, -1:] for states in rest)], dim=1)


class _Drawn(LogitsProcessor):
    """Makes the drawn token the only likely one, so that greedy generation takes it."""

    def __init__(self, draw: Draw):
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter_(1, self.draw(scores.float()), 0.0)


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens up to the first stop token, including it."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))]
