"""Pseudo samples: whole rows, prompt and answer, that a model writes after the mark of their task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.api.rows import IGNORED, TokenRow
from holdfast.errors import ConfigError
from holdfast.models.generation import inference
from holdfast.models.pretrained import begin_tokens

TRIES = 4  # for each sample that is asked for


@dataclass(frozen=True)
class Writing:
    """How the rows of a task are written to be generated: begin, the task's mark, prompt, separator, answer, end.

    The marks are ordinary tokens of the tokenizer's, so that no model needs a larger vocabulary.
    """

    begin: list[int]
    mark: list[int]
    separator: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: Any, task: str) -> Writing:
        """The writing of a task.

        Raises:
            ConfigError: the tokenizer makes the same of separator and end.
        """
        texts = f"__gen {task}__ ", " __ans__ ", " __end__"
        mark, separator, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        if separator == end:
            raise ConfigError(f"the tokenizer cannot tell {texts[1]!r} from {texts[2]!r}, the marks of pseudo samples")
        return cls(begin_tokens(tokenizer), mark, separator, end)

    @property
    def start(self) -> list[int]:
        """What a sample is generated from."""
        return self.begin + self.mark

    @property
    def extra(self) -> int:
        """Tokens by which a written row is longer."""
        return len(self.mark) + len(self.separator) + len(self.end)

    def write(self, row: TokenRow) -> dict[str, list[int]]:
        """A row to be learned as one text: all but its start is supervised. Its answer is the last supervised run."""
        ids, labels = list(row["input_ids"]), list(row["labels"])
        stop = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
        first = max((place for place in range(stop) if labels[place] == IGNORED), default=-1) + 1
        before = ids[:first][len(self.begin) if ids[: len(self.begin)] == self.begin else 0 :]
        written = before + self.separator + ids[first:stop] + self.end
        return {"input_ids": self.start + written, "labels": [IGNORED] * len(self.start) + written}

    def read(self, generated: Sequence[int]) -> dict[str, list[int]] | None:
        """The row that was generated after the start; None unless it has one separator, an answer and an end."""
        tokens = list(generated)
        ends = _places(tokens, self.end)
        separators = _places(tokens[: ends[0]], self.separator) if ends else []
        if len(separators) != 1:
            return None
        before = self.begin + tokens[: separators[0]]
        answer = tokens[separators[0] + len(self.separator) : ends[0]]
        row = {"input_ids": before + answer, "labels": [IGNORED] * len(before) + answer}
        return row if any(label != IGNORED for label in row["labels"][1:]) else None


def write_samples(
    model: Any, writing: Writing, count: int, *, length: int, batch_size: int, top_k: int, seed: int
) -> list[dict[str, list[int]]]:
    """Pseudo samples of a task, sampled from the ``top_k`` likeliest tokens.

    Args:
        model: learned rows as :meth:`Writing.write` writes them.
        count: samples to write; fewer come back where not enough of four times as many tries are whole rows.
        length: tokens of a written row at most.
        batch_size: samples written together.
        seed: of the choices; no other random state is read or changed.

    Returns:
        rows as they are learned: ``input_ids`` and ``labels``, -100 before the answer.
    """
    chance = torch.Generator().manual_seed(seed)
    found: list[dict[str, list[int]]] = []
    for start in range(0, TRIES * count, batch_size):
        tries = min(batch_size, TRIES * count - start)
        rows = map(writing.read, _sample(model, writing, tries, length, top_k, chance))
        found += [row for row in rows if row is not None]
        if len(found) >= count:
            break
    return found[:count]


def _sample(
    model: Any, writing: Writing, count: int, length: int, top_k: int, chance: torch.Generator
) -> list[list[int]]:
    """What the model writes after the start, until each text has its end or is ``length`` tokens long in all."""
    texts: list[list[int]] = [[] for _ in range(count)]
    done = [False] * count
    tokens = torch.tensor([writing.start] * count, device=model.device)
    cache = None
    with inference(model):
        for _ in range(length - len(writing.start)):
            outputs = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
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
    """Where ``part`` stands in ``tokens``."""
    return [place for place in range(len(tokens) - len(part) + 1) if tokens[place : place + len(part)] == part]
