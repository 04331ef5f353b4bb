"""Pseudo samples: whole rows, prompt and answer, that a model generates after the mark of their task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.api.rows import IGNORED, TokenRow, last_answer
from holdfast.errors import ConfigError
from holdfast.models.cache import NAMES, cache_name, cache_of
from holdfast.models.generation import inference
from holdfast.models.head import base
from holdfast.models.pretrained import begin_tokens
from holdfast.models.seq2seq import answered_row, encoder_inputs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRIES = 4  # for each wanted sample


@dataclass(frozen=True)
class Writing:
    """The form in which a model learns to generate rows of a task: begin, mark, prompt, separator, answer, end.

    Mark, separator and end are ordinary tokens of the tokenizer, so that no model needs a larger vocabulary. The
    encoder of a sequence-to-sequence model reads begin and mark, and its decoder writes the rest, as in the paper.

    Attributes:
        decoder: the start token of a sequence-to-sequence model's decoder; None: the model is causal.
    """

    begin: list[int]
    mark: list[int]
    separator: list[int]
    end: list[int]
    decoder: int | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, task: str, decoder: int | None = None) -> Writing:
        """The form of a task's rows.

        Args:
            decoder: the start token of a sequence-to-sequence model's decoder.

        Raises:
            ConfigError: the tokenizer gives separator and end the same tokens.
        """
        texts = f"__gen {task}__ ", " __ans__ ", " __end__"
        mark, separator, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        if separator == end:
            raise ConfigError(f"the tokenizer cannot tell {texts[1]!r} from {texts[2]!r}, the marks of pseudo samples")
        return cls(begin_tokens(tokenizer), mark, separator, end, decoder)

    @property
    def start(self) -> list[int]:
        """The tokens that a sample is generated from."""
        return self.begin + self.mark

    @property
    def extra(self) -> int:
        """Tokens that this form adds to a row."""
        return len(self.mark) + len(self.separator) + len(self.end)

    def write(self, row: TokenRow) -> dict[str, list[int]]:
        """A row in this form, in which all tokens but the start are supervised.

        Args:
            row: a task's row; its answer is the last run of supervised tokens.
        """
        if self.decoder is not None:
            written = [*row["encoder_ids"], *self.separator, *row["input_ids"][1:], *self.end]
            return answered_row(self.start, written, self.decoder)
        before, answer = last_answer(row)
        prompt = before[len(self.begin) if before[: len(self.begin)] == self.begin else 0 :]
        written = prompt + self.separator + answer + self.end
        return {"input_ids": self.start + written, "labels": [IGNORED] * len(self.start) + written}

    def read(self, generated: Sequence[int]) -> dict[str, list[int]] | None:
        """The row in tokens that were generated after the start; None unless it has one separator, answer and end."""
        tokens = list(generated)
        ends = _places(tokens, self.end)
        separators = _places(tokens[: ends[0]], self.separator) if ends else []
        if len(separators) != 1:
            return None
        prompt = tokens[: separators[0]]
        answer = tokens[separators[0] + len(self.separator) : ends[0]]
        if self.decoder is not None:
            return answered_row(prompt, answer, self.decoder) if prompt and answer else None
        row = answered_row(self.begin + prompt, answer, None)
        return row if any(label != IGNORED for label in row["labels"][1:]) else None


def write_samples(
    model: PreTrainedModel | PeftModel,
    writing: Writing,
    count: int,
    *,
    length: int,
    batch_size: int,
    top_k: int,
    seed: int,
    on_batch: Callable[[int, int], None],
) -> list[dict[str, list[int]]]:
    """Pseudo samples of a task, each token sampled from the ``top_k`` likeliest ones.

    Args:
        model: has learned rows in the form of :meth:`Writing.write`.
        count: samples to write, in four times as many tries at most; fewer are returned if too few are whole rows.
        length: tokens of a generated row at most.
        batch_size: samples generated together.
        seed: of the choices; no other random state is read or changed.
        on_batch: called before every batch with (samples so far, all samples); it may raise to stop.

    Returns:
        rows of the task: ``input_ids`` and ``labels``, -100 before the answer.
    """
    chance = torch.Generator().manual_seed(seed)
    samples: list[dict[str, list[int]]] = []
    for start in range(0, TRIES * count, batch_size):
        on_batch(len(samples), count)
        tries = min(batch_size, TRIES * count - start)
        rows = map(writing.read, _sample(model, writing, tries, length, top_k, chance))
        samples += [row for row in rows if row is not None]
        if len(samples) >= count:
            break
    return samples[:count]


def _sample(
    model: PreTrainedModel | PeftModel, writing: Writing, count: int, length: int, top_k: int, chance: torch.Generator
) -> list[list[int]]:
    """Generate ``count`` texts after the start, until each has its end or is ``length`` tokens long with the start."""
    texts: list[list[int]] = [[] for _ in range(count)]
    done = [False] * count
    start, apart = writing.start, dict[str, Tensor]()
    if writing.decoder is not None:
        start, apart = [writing.decoder], encoder_inputs([writing.start] * count, 0, model.device)
    tokens = torch.tensor([start] * count, device=model.device)
    cache, cache_argument = None, cache_name(base(model)) or NAMES[0]
    with inference(model):
        for _ in range(length - len(start)):
            outputs = model(input_ids=tokens, use_cache=True, **apart, **{cache_argument: cache})
            cache = cache_of(outputs)
            logits, ids = outputs.logits[:, -1].float().topk(min(top_k, outputs.logits.shape[-1]))
            drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=chance).to(ids.device)
            tokens = ids.gather(1, drawn)
            for number, [token] in enumerate(tokens.tolist()):
                texts[number].append(token)
                done[number] |= texts[number][-len(writing.end) :] == writing.end
            if all(done):
                break
    return texts


def _places(tokens: list[int], part: list[int]) -> list[int]:
    """The places in ``tokens`` where ``part`` begins."""
    return [place for place in range(len(tokens) - len(part) + 1) if tokens[place : place + len(part)] == part]
