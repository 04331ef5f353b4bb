"""Examples to tokens: the template, which tokens are supervised, and what is left out of a row that is too long."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from holdfast.config import ModelConfig
from holdfast.data.task import Example, Turn
from holdfast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")

# Unicode noncharacters, which no text holds: they mark a cut span while a template is rendered.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class _Piece:
    """A stretch of a conversation's text that is tokenised on its own: before an answer, or an answer with its end."""

    text: str
    answer: bool


@dataclass(frozen=True)
class _Tokens:
    """A tokenised piece. ``offsets()`` are the [start, end) of each token in the piece's text."""

    ids: list[int]
    answer: bool
    offsets: Callable[[], list[tuple[int, int]]]


class Encoder:
    """Turns examples into token sequences to train on and prompts to generate from.

    Every answer is tokenised apart from what stands before it, so that a training sequence begins with exactly the
    tokens of the example's prompt: what is trained is what is generated from.

    Args:
        tokenizer: a fast tokenizer.
        max_length: tokens of a sequence, at most.
        template: chat: the tokenizer's chat template. plain: turns joined by newlines, a space before each answer,
            the end-of-sequence token after it. auto: chat where the tokenizer has such a template.
        supervise: answer: the loss counts the tokens of all answers with their ends. all: every token but the first
            where that is the beginning-of-sequence token.

    Raises:
        ConfigError: template is chat and the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        template: Literal["auto", "chat", "plain"] = "auto",
        supervise: Literal["answer", "all"] = "answer",
    ):
        if template == "chat" and not tokenizer.chat_template:
            raise ConfigError("data.template: is chat, but the tokenizer has no chat template; use plain or auto")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.supervise = supervise
        self.chat = template != "plain" and bool(tokenizer.chat_template)
        self._shortened: set[tuple[str, int]] = set()

        bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        begins = full[: len(full) - len(bare)] == [tokenizer.bos_token_id]
        self._begin = [tokenizer.bos_token_id] if begins else []
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # SentencePiece-like tokenizers put a space before whatever they are given.
        self._prepends = tokenizer.decode(bare + bare) != "aa"

    @property
    def truncated(self) -> int:
        """Examples that were shortened so far, each counted once."""
        return len(self._shortened)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: end of sequence and, with a chat template, the special tokens after an answer."""
        ids = set(self._end)
        if self.chat:
            example = Example("", 0, (Turn("user", "question"), Turn("assistant", "answer")))
            end = self._pieces(example)[-1][-1].text.split("answer")[-1]
            special = self.tokenizer.added_tokens_decoder
            tokens = self.tokenizer(end, add_special_tokens=False)["input_ids"]
            ids |= {token for token in tokens if token in special and special[token].special}
        return sorted(ids)

    def encode(self, example: Example) -> list[dict[str, Any]]:
        """Training sequences of one example.

        Usually one. A text that is longer than ``max_length`` gives several windows, each of which begins with the
        last token of the one before, so that every token is predicted once. A conversation of which the chat template
        rewrites earlier turns gives one sequence an answer.

        Returns:
            ``input_ids`` and ``labels`` (lists of int of the same length; -100 where not supervised) and ``row``.

        Raises:
            DataError: the row is too long although all its input is left out, no token is supervised, or the chat
                template cannot render it.
        """
        return self.encode_all([example])

    def encode_all(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Training sequences of many examples, in order; see `encode`."""
        sequences = [
            (example, number, pieces)
            for example in examples
            for number, pieces in enumerate(self._pieces(example))
        ]
        rows: list[dict[str, Any]] = []
        tokenised = self._tokenise([pieces for _, _, pieces in sequences])
        for (example, number, _), tokens in zip(sequences, tokenised, strict=True):
            if example.text is not None:
                rows += self._windows(example, tokens[0].ids)
                continue
            parts = self._fit(example, number, tokens, self.max_length)
            ids = [token for part in parts for token in part]
            labels = [
                token if piece.answer else IGNORED
                for piece, part in zip(tokens, parts, strict=True)
                for token in part
            ]
            rows.append(self._row(example, ids, labels if self.supervise == "answer" else ids))
        return rows

    def prompt(self, example: Example, reserve: int) -> list[int]:
        """Tokens to generate the last answer from: everything before it, shortened to ``max_length - reserve``.

        Raises:
            DataError: it does not fit although all its input is left out.
        """
        sequences = self._pieces(example)
        [tokens] = self._tokenise([sequences[-1][:-1]])
        parts = self._fit(example, len(sequences) - 1, tokens, self.max_length - reserve, reserve)
        return [token for part in parts for token in part]

    def answer_length(self, example: Example) -> int:
        """Tokens of the last answer with its end."""
        [tokens] = self._tokenise([self._pieces(example)[-1]])
        return len(tokens[-1].ids)

    def decode(self, ids: list[int]) -> str:
        """The text of a response: no special tokens, no white space around it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    # --- text ---

    def _pieces(self, example: Example) -> list[list[_Piece]]:
        """An example's sequences as text: pieces that alternate between what stands before an answer and the answer."""
        if example.text is not None:
            return [[_Piece(example.text, False)]]
        if not self.chat:
            return [_plain(example.turns)]
        from jinja2 import TemplateError

        try:
            try:
                return self._chat_pieces(example.turns)
            except TemplateError:
                if all(turn.role != "system" for turn in example.turns):
                    raise
                return self._chat_pieces(_without_system(example.turns))
        except (TemplateError, _TemplateBrokenError) as error:
            raise DataError(
                f"{_where(example)}: the chat template cannot be used: {error}; data.template: plain would do"
            ) from None

    def _chat_pieces(self, turns: Sequence[Turn]) -> list[list[_Piece]]:
        sequences: list[list[_Piece]] = []
        done = None
        for end, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:end], add_generation_prompt=True)
            after = self._render(turns[: end + 1], add_generation_prompt=False)
            if not after.startswith(before):
                raise _TemplateBrokenError(
                    f"with an answer it does not begin as without: {_at_difference(before, after)}"
                )
            answer = after[len(before) :]
            if not answer.lstrip().startswith(turn.content):
                raise _TemplateBrokenError(
                    f"it puts {answer[: answer.find(turn.content)]!r} before the answer"
                    if turn.content in answer
                    else f"it changes the answer {turn.content[:60]!r}"
                )
            if done is not None and before.startswith(done):
                sequences[-1] += [_Piece(before[len(done) :], False), _Piece(answer, True)]
            else:
                sequences.append([_Piece(before, False), _Piece(answer, True)])
            done = after
        return sequences

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
            strftime_now=_fixed_date,
        )

    # --- tokens ---

    def _tokenise(self, sequences: list[list[_Piece]]) -> list[list[_Tokens]]:
        """Tokenise each different text once, the later pieces of a sequence as the middle of a text."""
        keys = [[(piece.text, i > 0) for i, piece in enumerate(pieces)] for pieces in sequences]
        unique = list(dict.fromkeys(key for sequence in keys for key in sequence))
        anchored = [_anchor(text) if inside and self._prepends else "" for text, inside in unique]
        texts = [anchor + text for anchor, (text, _) in zip(anchored, unique, strict=True)]
        encodings = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        ).encodings
        found = {}
        for key, anchor, encoding in zip(unique, anchored, encodings, strict=True):
            if anchor:
                offsets = encoding.offsets
                skip = sum(end <= len(anchor) for _, end in offsets)
                shifted = [(start - len(anchor), end - len(anchor)) for start, end in offsets[skip:]]
                found[key] = encoding.ids[skip:], lambda shifted=shifted: shifted
            else:
                found[key] = encoding.ids, lambda encoding=encoding: encoding.offsets
        result = []
        for pieces, sequence in zip(sequences, keys, strict=True):
            tokens = [_Tokens(found[key][0], piece.answer, found[key][1]) for piece, key in zip(pieces, sequence, strict=True)]
            if not self.chat or not any(piece.answer for piece in pieces):
                ...
            result.append(tokens)
        return result
