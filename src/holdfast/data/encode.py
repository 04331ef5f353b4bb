"""Examples to tokens: the template, which tokens are supervised, and what is left out of a row that is too long."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from holdfast.api.rows import IGNORED
from holdfast.api.task import PICTURE, Example, Turn
from holdfast.data.chat import ChatTemplate
from holdfast.data.files import where
from holdfast.data.levels import levelled
from holdfast.data.long_text import STRETCH, encoding_of
from holdfast.data.pieces import Piece, last_answer, plain_pieces
from holdfast.data.tally import Tally
from holdfast.errors import ConfigError, DataError
from holdfast.models.pretrained import begin_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.models.sight import Sight

# Unicode noncharacters, which text does not hold: they mark a cut span while a template is rendered.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = f"[{_OPEN}{_CLOSE}]"

FIRST = 8
"""The character before a text has no more tokens."""

NO_SETTINGS = ("tokenizer", "sight", "_template", "tally")
"""Attributes of an encoder that are no plain settings."""


class Encoder:
    """Turns examples into token sequences to train on and prompts to generate from.

    What stands before an answer and the answer with its end are tokenised apart, so that a training sequence begins
    with exactly the tokens of the example's prompt: what is trained is what is generated from.

    Args:
        tokenizer: a fast tokenizer.
        max_length: tokens of a sequence, at most.
        template: chat: the tokenizer's chat template. plain: turns joined by newlines, a space before each answer,
            the end-of-sequence token after it. auto: chat where the tokenizer has such a template.
        supervise: answer: the loss counts the tokens of all answers with their ends. all: every token but a
            beginning-of-sequence token.
        long_answers: what becomes of a training sequence that is too long even without its input. error: it is
            refused. cut: its last answer loses its end, down to half of ``max_length`` where the input needs the rest,
            and the sequence its end token.

    Raises:
        ConfigError: template is chat and the tokenizer has no chat template.
    """

    sight: Sight | None = None
    """How the model sees, of one that does."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        template: Literal["auto", "chat", "plain"] = "auto",
        supervise: Literal["answer", "all"] = "answer",
        long_answers: Literal["error", "cut"] = "error",
    ):
        if template == "chat" and not tokenizer.chat_template:
            raise ConfigError("data.template: is chat, but the tokenizer has no chat template; plain or auto would do")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.supervise = supervise
        self.chat = template != "plain" and bool(tokenizer.chat_template)
        self._template = ChatTemplate(tokenizer)
        self._cuts_answers = long_answers == "cut"
        self.tally = Tally()

        self._begin = begin_tokens(tokenizer)
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # SentencePiece-like tokenizers put a space before whatever they are given.
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._prepends = tokenizer.decode(bare + bare) != "aa"

    def apart(self) -> Encoder:
        """The same encoder with counts of its own."""
        other = copy.copy(self)
        other.tally = Tally()
        return other

    def identity(self) -> dict[str, Any]:
        """All that decides which rows it makes of an example, beside the code."""
        own = {key: value for key, value in vars(self).items() if key not in NO_SETTINGS}
        tokenizer = self.tokenizer
        return own | {
            "kind": type(self).__name__,
            "tokenizer": [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str()],
            "special": tokenizer.special_tokens_map,
            "chat_template": tokenizer.chat_template,
        }

    @property
    def told(self) -> dict[str, str]:
        """The warnings that were given so far, by what each is about."""
        return self._template.told

    def tell(self, warnings: Mapping[str, str]) -> None:
        """Give the warnings of another encoder that were not given yet."""
        for what, warning in warnings.items():
            self._template.tell(what, warning)

    @property
    def truncated(self) -> int:
        """Examples that were shortened so far, each counted once."""
        return len(self.tally.shortened)

    @property
    def cut_answers(self) -> int:
        """Examples among them whose answer lost its end, each counted once."""
        return len(self.tally.cut)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: end of sequence and, in a chat template, the special tokens after an answer."""
        ids = set(self._end)
        if self.chat:
            probe = Example("the chat template", 0, (Turn("user", "question"), Turn("assistant", "answer")))
            pieces = self._pieces(probe)[-1]
            end = "".join(piece.text for piece in pieces[last_answer(pieces) :]).partition("answer")[2]
            known = self.tokenizer.added_tokens_decoder
            tokens = self.tokenizer(end, add_special_tokens=False)["input_ids"]
            ids |= {token for token in tokens if token in known and known[token].special}
        return sorted(ids)

    def encode(self, example: Example) -> list[dict[str, Any]]:
        """Training sequences of one example.

        Usually one. A text longer than ``max_length`` gives several windows, each of which begins with the last token
        of the one before, so that every token is predicted once. A conversation whose earlier turns the chat template
        rewrites as it goes on gives one sequence an answer.

        Returns:
            ``input_ids`` and ``labels`` (lists of int of one length; -100 where not supervised) and ``row``.

        Raises:
            DataError: the row is too long even without its input, no token is supervised, or the chat template cannot
                render it.
        """
        return self.encode_all([example])

    def encode_all(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Training sequences of many examples, in order; see :meth:`encode`."""
        sequences = [(example, n, pieces) for example in examples for n, pieces in enumerate(self._pieces(example))]
        tokenised = self._tokenise([pieces for _, _, pieces in sequences])
        rows: list[dict[str, Any]] = []
        longest = self._longest_answer(sequences, tokenised)  # before any is cut
        for (example, number, pieces), tokens in zip(sequences, tokenised, strict=True):
            if example.text is None:
                ids, labels = self._joined(pieces, self._fit(example, number, pieces, tokens, reserve=0))
                rows.append(self._row(example, ids, labels))
            else:
                ids, _ = self._joined(pieces, [tokens[0].ids])
                for start in range(0, max(1, len(ids) - 1), self.max_length - 1):
                    window = ids[start : start + self.max_length]
                    rows.append(self._row(example, window, window if start == 0 else [IGNORED, *window[1:]]))
        self.tally.longest = max(self.tally.longest, longest)
        return rows

    def choice(self, example: Example, *, end: bool) -> dict[str, Any]:
        """The sequence of an example in which only the last answer is supervised, to compare answers to one question.

        Args:
            end: whether the answer has its end. Without it, the tokens are those of which lm-evaluation-harness takes
                the likelihood. For this, in the plain template, white space at the end of the question is the answer's,
                a space follows it, and a sequence that is too long loses its beginning.

        Returns:
            as one of :meth:`encode`.

        Raises:
            DataError: as :meth:`encode`.
        """
        sequences = self._pieces(example)
        pieces = sequences[-1] if end else self._without_end(sequences[-1], example.answer)
        [tokens] = self._tokenise([pieces])
        if end or self.chat or any(piece.pictures for piece in pieces):
            parts = self._fit(example, len(sequences) - 1, pieces, tokens, reserve=0)
        else:
            parts = [piece.ids for piece in tokens]
        ids, _ = self._joined(pieces, parts)
        _, answer = self._joined(pieces[-1:], parts[-1:])
        labels = [IGNORED] * (len(ids) - len(answer)) + answer
        if len(ids) > self.max_length:
            self.tally.shortened.add((example.file, example.row))
        return self._row(example, ids[-self.max_length :], labels[-self.max_length :])

    def prompt(self, example: Example, reserve: int) -> list[int]:
        """Tokens to generate the last answer from: all that stands before it, in ``max_length - reserve`` tokens.

        Raises:
            DataError: it does not fit even without its input, or the chat template cannot render it.
        """
        sequences = self._pieces(example)
        pieces = sequences[-1][: last_answer(sequences[-1])]
        [tokens] = self._tokenise([pieces])
        return self._joined(pieces, self._fit(example, len(sequences) - 1, pieces, tokens, reserve))[0]

    def inside(self, text: str) -> list[int]:
        """Tokens of a text that stands within another."""
        [[_, tokens]] = self._tokenise([[Piece(""), Piece(text)]])
        return tokens.ids

    def fits(self, example: Example, reserve: int) -> bool:
        """Whether nothing of what stands before the last answer has to be cut to leave ``reserve`` tokens free."""
        pieces = self._pieces(example)[-1]
        pieces = pieces[: last_answer(pieces)]
        [tokens] = self._tokenise([pieces])
        return len(self._joined(pieces, [part.ids for part in tokens])[0]) <= self.max_length - reserve

    def asked(self, prompt: list[int]) -> dict[str, list[int]]:
        """The row of :meth:`prompt`'s tokens, without an answer."""
        return {"input_ids": prompt}

    def of_text(self, row: dict[str, Any]) -> dict[str, Any]:
        """The model's row of a text's ``input_ids`` and ``labels``."""
        return row

    def sign_as_text(self, example: Example) -> str | None:
        """The first special token that an example's text spells, where that is read as letters: not among a chat
        template's own."""
        return None if self.chat else self._template.special_token(example)

    def answer_length(self, example: Example) -> int:
        """Tokens of the last answer with its end."""
        pieces = self._pieces(example)[-1]
        [tokens] = self._tokenise([pieces])
        return self._answer_length(pieces, tokens)

    def shown(self, ids: Sequence[int]) -> str:
        """The text of a row's tokens for people, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without special tokens, without the reasoning before it and white space around it."""
        text = self.tokenizer.decode(ids, skip_special_tokens=not self.chat, clean_up_tokenization_spaces=False)
        return self.answer(text)

    def answer(self, text: str) -> str:
        """What a response's text says: without the reasoning before it and white space around it."""
        return self._template.answer(text) if self.chat else text.strip()

    # --- text ---

    def _pieces(self, example: Example) -> list[list[Piece]]:
        """The text of an example's sequences, in pieces: in turn what stands before an answer, and the answer."""
        if example.text is not None:
            return [[Piece(example.text, begins=True, supervised=True)]]
        if self.sight is None and any(turn.pictures for turn in example.turns):
            raise DataError(
                f"{where(example.file, example.row)}: shows a picture, and the model reads text alone; a model that "
                "sees would do, or leave the pictures out with columns: {image: null}"
            )
        if not self.chat:
            return [plain_pieces(example)]
        return self._template.pieces(example)

    def _without_end(self, pieces: list[Piece], answer: str) -> list[Piece]:
        """The pieces of a sequence, in which nothing stands after the last answer."""
        first = last_answer(pieces)
        if self.chat:
            text = "".join(piece.text for piece in pieces[first:])
            text = text[: text.index(answer.strip()) + len(answer.strip())]
            return [*pieces[:first], Piece(text, answer=True, supervised=True)]
        question = pieces[first - 1]
        text = question.text.rstrip()
        space = question.text[len(text) :] + " "
        shortened = replace(question, text=text)
        return [*pieces[: first - 1], shortened, Piece(space + answer, answer=True, supervised=True)]

    # --- tokens ---

    def _tokenise(self, sequences: list[list[Piece]]) -> list[list[_Tokens]]:
        """Tokenise each different text once; all pieces but the first of a sequence as the middle of a text."""
        keys = [
            [(piece.text, i > 0 and self._prepends and not piece.control) for i, piece in enumerate(pieces)]
            for pieces in sequences
        ]
        unique = list(dict.fromkeys(key for sequence in keys for key in sequence))
        control = {piece.text for pieces in sequences for piece in pieces if piece.control}
        found = {(text, False): _Tokens(self._encodings([text], control=True)[0]) for text in control}
        unique = [key for key in unique if key not in found]
        anchors = [_anchor(text) if inside else "" for text, inside in unique]
        encodings = self._encodings([anchor + text for anchor, (text, _) in zip(anchors, unique, strict=True)])
        for key, anchor, encoding in zip(unique, anchors, encodings, strict=True):
            found[key] = _Tokens(encoding)
            if anchor:
                begin = encoding.offsets[:FIRST]
                skip = sum(bool(end <= len(anchor)) for _, end in begin)
                merged = any(start < len(anchor) < end for start, end in begin)
                found[key] = _Tokens(self._encodings([key[0]])[0]) if merged else _Tokens(encoding, skip, len(anchor))
        return [[found[key] for key in sequence] for sequence in keys]

    def _encodings(self, texts: list[str], control: bool = False) -> list[Any]:
        if any(len(text) > STRETCH for text in texts):
            return [encoding_of(text, lambda text: self._encoded([text], control)[0]) for text in texts]
        return self._encoded(texts, control) if texts else []

    def _encoded(self, texts: list[str], control: bool) -> list[Any]:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not (self.chat or control),  # what a text says is text, not control tokens
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).encodings

    def _joined(self, pieces: Sequence[Piece], parts: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        """One sequence of the pieces' tokens, and its labels."""
        ids: list[int] = []
        labels: list[int] = []
        for piece, part in zip(pieces, parts, strict=True):
            whole = (self._begin if piece.begins else []) + part + (self._end if piece.ends else [])
            counted = not piece.untrained if self.supervise == "all" else piece.supervised
            ids += whole
            labels += whole if counted else [IGNORED] * len(whole)
        return ids, labels

    def _longest_answer(
        self, sequences: Sequence[tuple[Example, int, list[Piece]]], tokenised: Sequence[Sequence[_Tokens]]
    ) -> int:
        """Tokens of the longest last answer among the sequences of some examples."""
        last = {
            id(example): (pieces, tokens)
            for (example, _, pieces), tokens in zip(sequences, tokenised, strict=True)
            if example.text is None
        }
        return max((self._answer_length(pieces, tokens) for pieces, tokens in last.values()), default=0)

    def _answer_length(self, pieces: Sequence[Piece], tokens: Sequence[_Tokens]) -> int:
        """Tokens of a sequence's last answer with its end."""
        answer = slice(last_answer(pieces), None)
        around = [len(self._begin) * piece.begins + len(self._end) * piece.ends for piece in pieces[answer]]
        return sum(around) + sum(map(len, tokens[answer]))

    def _row(self, example: Example, ids: list[int], labels: list[int]) -> dict[str, Any]:
        begins = ids[:1] == [self.tokenizer.bos_token_id]
        labels = [IGNORED] * begins + labels[begins:]
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(f"{where(example.file, example.row)}: nothing left to supervise")
        return {"input_ids": ids, "labels": labels, "row": example.row}

    def _fit(
        self, example: Example, number: int, pieces: list[Piece], tokens: list[_Tokens], reserve: int
    ) -> list[list[int]]:
        """The tokens of each piece; where they are too many, without the middle of the longest cut spans.

        Args:
            number: which of the example's sequences the pieces belong to.
            reserve: tokens to leave free.
        """
        parts = [piece.ids for piece in tokens]
        length = len(self._joined(pieces, parts)[0])
        excess = length - (self.max_length - reserve)
        if excess <= 0:
            return parts
        spans = self._cut_spans(example, number, pieces, tokens)
        sizes = [last - first for _, first, last in spans]
        if sum(sizes) < excess and self._cuts_answers and pieces[-1].supervised:
            if pieces[-1].ends:
                pieces[-1] = replace(pieces[-1], ends=False)
                excess -= len(self._end)
            surplus = max(0, excess - sum(sizes), min(excess, len(parts[-1]) - self.max_length // 2))
            kept = max(1, len(parts[-1]) - surplus)
            excess -= len(parts[-1]) - kept
            parts[-1] = parts[-1][:kept]
            self.tally.cut.add((example.file, example.row))
        if sum(sizes) < excess:
            raise DataError(
                f"{where(example.file, example.row)}: has {length} tokens, of which {sum(sizes)} are input that may be "
                f"cut; the other {length - sum(sizes)}{_of_pictures(pieces)} are more than the "
                f"{self.max_length - reserve} of "
                f"data.max_length={self.max_length}"
                + (f" less {reserve} for the response (evaluation.max_new_tokens)" if reserve else "")
                + "; raise data.max_length, or shorten the row"
                + (
                    ""
                    if reserve or self._cuts_answers or not pieces[-1].answer
                    else "; data.long_answers=cut cuts the end of its answer"
                )
            )
        self.tally.shortened.add((example.file, example.row))
        for (index, first, last), keep in reversed(list(zip(spans, levelled(sizes, excess), strict=True))):
            head, tail = first + (keep + 1) // 2, last - keep // 2
            parts[index] = parts[index][:head] + parts[index][tail:]
        return parts

    def _cut_spans(
        self, example: Example, number: int, pieces: list[Piece], tokens: list[_Tokens]
    ) -> list[tuple[int, int, int]]:
        """Which tokens may be cut, as (piece, first token, last token + 1) in order, found by rendering with marks."""
        marked = self._pieces(replace(example, turns=tuple(_marked(turn) for turn in example.turns)))[number]
        spans = []
        for index, (piece, with_marks, found) in enumerate(zip(pieces, marked, tokens, strict=False)):
            if piece.answer:
                continue
            if re.sub(_MARKS, "", with_marks.text).rstrip() != piece.text.rstrip():
                return []  # the template says something else where an input is marked
            text, *rest = re.split(_MARKS, with_marks.text)
            for inside, outside in zip(rest[::2], rest[1::2], strict=True):
                start, end = len(text), len(text) + len(inside)
                if within := found.within(start, end):
                    spans.append((index, *within))
                text += inside + outside
        return spans


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a text, that is, of ``encoding`` without the first ``skip``, which are of ``shift`` characters."""

    encoding: Any
    skip: int = 0
    shift: int = 0

    def __len__(self) -> int:
        return len(self.encoding) - self.skip

    @property
    def ids(self) -> list[int]:
        return self.encoding.ids[self.skip :]

    def within(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and the last of the tokens, plus 1, that lie within a stretch of the text, if any do."""
        offsets = np.asarray(self.encoding.offsets).reshape(-1, 2)[self.skip :] - self.shift
        inside = np.flatnonzero((start <= offsets[:, 0]) & (offsets[:, 1] <= end))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else None


def _of_pictures(pieces: Sequence[Piece]) -> str:
    places = sum(count for piece in pieces for _, count in piece.pictures)
    return f" ({places} of them pictures)" if places else ""


def _marked(turn: Turn) -> Turn:
    """Mark the stretches of the cut span between pictures, inside their white space, which a template may strip."""
    start, end = turn.cut or (0, 0)
    content = turn.content
    stretches = [_marked_stretch(text) for text in content[start:end].split(PICTURE)]
    return replace(turn, content=content[:start] + PICTURE.join(stretches) + content[end:], cut=None)


def _marked_stretch(text: str) -> str:
    if not text.strip():
        return text
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return text[:start] + _OPEN + text[start:end] + _CLOSE + text[end:]


def _anchor(text: str) -> str:
    """A character to put before a text so that it is tokenised as the middle of one."""
    return "a" if text[:1].isspace() else "\n"


def resolve_max_length(requested: int | None, model_config: Any, taken: int = 0) -> int:
    """Tokens of a sequence: ``data.max_length``, or the model's context where absent.

    Args:
        taken: places in the context that soft prompts take.

    Raises:
        ConfigError: more is requested than the model's context, or neither is known; or soft prompts fill the context.
    """
    text_config = model_config.get_text_config()
    context: int | None = getattr(text_config, "max_position_embeddings", None)
    if requested is None and context is None:
        requested = getattr(text_config, "n_positions", None)  # T5 reads more, but was trained with so many
    if context is not None and taken >= context:
        raise ConfigError(f"tuner: a soft prompt of {taken} tokens leaves nothing of the model's context of {context}")
    if context is not None:
        context -= taken
    if requested is None and context is None:
        raise ConfigError("data.max_length: is needed, as the model states no context length")
    if requested is not None and context is not None and requested > context:
        rest = f", without the {taken} of a soft prompt" if taken else ""
        raise ConfigError(f"data.max_length: {requested} is more than the model's context of {context} tokens{rest}")
    length = requested or context
    assert length is not None
    return length
