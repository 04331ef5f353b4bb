"""Tokens to text while they come, and an answer that ends at its stop texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from holdfast.models.batcher import TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = 5  # tokens before a text that decide how it begins
LONGEST_CHARACTER = 8  # tokens; after so many that are no whole character, none is awaited
BROKEN = "\ufffd"


class Decoder:
    """A tokenizer's decoding. The tokenizer must be used by nothing else at the same time that changes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._anchor: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._begin = len(self.text(self._anchor))
        self._named: dict[int, str] = {}

    def text(self, ids: Sequence[int], special: bool = True) -> str:
        """The text of tokens, with or without that of special ones."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def token(self, token: int) -> str:
        """The text of one token in the middle of a text."""
        if token not in self._named:
            self._named[token] = self.text([*self._anchor, token])[self._begin :]
        return self._named[token]


class Increments:
    """The text that each further token adds; empty while a character is not complete.

    Args:
        before: tokens before the text.
        special: whether special tokens have text.
    """

    def __init__(self, decoder: Decoder, before: Sequence[int] = (), special: bool = False):
        self._decoder, self._special = decoder, special
        self._ids = list(before[-BEFORE:])
        self._read = len(self._ids)

    def add(self, token: int) -> str:
        """What a token adds."""
        self._ids.append(token)
        new = self.rest()
        if not new or (new.endswith(BROKEN) and len(self._ids) - self._read < LONGEST_CHARACTER):
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return new

    def rest(self) -> str:
        """What is left when no further token comes."""
        known = self._decoder.text(self._ids[: self._read], self._special)
        return self._decoder.text(self._ids, self._special)[len(known) :]


@dataclass(frozen=True)
class Told:
    """A token of an answer or a prompt, and the end of its text in the whole; infinite while a character is awaited."""

    token: TokenLogprob
    start: int
    end: float = inf


class Shown(NamedTuple):
    """What may be shown of an answer: its text, its tokens, and why it has ended, if it has."""

    text: str
    told: list[Told]
    finish: str | None


class Answer:
    """One answer while it comes.

    Args:
        prompt: the tokens before it.
        ends: tokens that end it.
        stops: texts that end it, and are no part of it.
        max_tokens: at most.
        drops_space: the space that the plain template puts before an answer is no part of it.
        on_change: called after each token.

    Attributes:
        text: what may be shown: no part of a stop text.
        told: its tokens, as far as they are shown.
        generated: tokens so far, with an end token.
        finish: stop or length; None while it goes on.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        *,
        ends: Collection[int],
        stops: Sequence[str],
        max_tokens: int,
        drops_space: bool = False,
        on_change: Callable[[Shown], None] | None = None,
    ):
        self._increments = Increments(decoder, prompt)
        self._ends, self._stops, self._max_tokens = ends, stops, max_tokens
        self._drops_space, self._on_change = drops_space, on_change
        self._text, self._tokens, self._cut = "", list[Told](), False
        self.text, self.told = "", list[Told]()
        self.generated = 0
        self.finish: str | None = None if max_tokens else "length"

    @property
    def shown(self) -> Shown:
        """What may be shown so far."""
        return Shown(self.text, self.told, self.finish)

    @property
    def mean_logprob(self) -> float:
        """Of all its tokens."""
        values = [told.token.logprob for told in self._tokens]
        return sum(value for value in values if value is not None) / max(len(values), 1)

    def take(self, token: TokenLogprob) -> bool:
        """Add a token; whether the answer ends with it."""
        self.generated += 1
        self._tokens.append(Told(token, len(self._text)))
        if token.id in self._ends:
            self.finish = "stop"
        else:
            self._add(self._increments.add(token.id))
            if self.finish is None and self.generated >= self._max_tokens:
                self.finish = "length"
        if self.finish is not None and not self._cut:
            self._add(self._increments.rest())
        if self.finish is not None and not self._cut:
            self._placed(len(self._text))
        self._show()
        if self._on_change is not None:
            self._on_change(self.shown)
        return self.finish is not None

    def _add(self, new: str) -> None:
        if not new:
            return
        if self._drops_space:
            self._drops_space = False
            new = new.removeprefix(" ")
        before = len(self._text)
        self._text += new
        self._placed(len(self._text))
        found = [at for stop in self._stops if (at := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            self._text, self._cut, self.finish = self._text[: min(found)], True, "stop"

    def _placed(self, end: int) -> None:
        """The tokens that waited for their text end here."""
        number = len(self._tokens)
        while number and self._tokens[number - 1].end == inf:
            number -= 1
            self._tokens[number] = replace(self._tokens[number], end=end)

    def _show(self) -> None:
        """Show all but what may become a stop text."""
        end = len(self._text)
        if self.finish is None:
            end -= max((_overlap(self._text, stop) for stop in self._stops), default=0)
        self.text = self._text[:end]
        shown = len(self.told)
        while shown < len(self._tokens) and self._tokens[shown].end <= end:
            shown += 1
        self.told = self._tokens[:shown]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop text begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def told_prompt(decoder: Decoder, tokens: Sequence[TokenLogprob], begin: int, length: int) -> list[Told]:
    """The tokens of a prompt.

    Args:
        begin: how many of them, at the beginning, have no text in the prompt.
        length: of the prompt's text, in characters.
    """
    increments = Increments(decoder, special=True)
    told, at = [], 0
    for number, token in enumerate(tokens):
        new = increments.add(token.id)
        end = min(at + len(new), length) if number >= begin else 0
        told.append(Told(token, at, end))
        at = end
    return told
