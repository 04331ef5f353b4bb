"""Examples to rows of a sequence-to-sequence model: the encoder gets the prompt, the decoder learns the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from holdfast.api.task import Example
from holdfast.data.encode import Encoder
from holdfast.data.encode_seen import SeeingEncoder
from holdfast.data.files import where
from holdfast.data.pieces import Piece, plain_pieces
from holdfast.errors import ConfigError, DataError
from holdfast.models.kinds import is_seq2seq
from holdfast.models.seq2seq import answered_row, around, decoder_start, empty_prompt, text_row

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from holdfast.models.sight import Sight


class ApartEncoder(Encoder):
    """Turns examples into rows of a sequence-to-sequence model (:mod:`holdfast.models.seq2seq`).

    The prompt is all that stands before an answer, in the plain template, between the tokens that the tokenizer puts
    around a text. The answer stands between those that it puts around a target (``text_target``), and ends with the end
    token. Each answer of a conversation makes a row of its own. ``max_length`` bounds the prompt and the answer each.

    Args:
        start: the token that the decoder begins with.

    Raises:
        ConfigError: prompts are to be supervised, or written by a chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        start: int,
        template: Literal["auto", "chat", "plain"] = "auto",
        supervise: Literal["answer", "all"] = "answer",
        long_answers: Literal["error", "cut"] = "error",
    ):
        if template == "chat":
            raise ConfigError(
                "data.template: is chat, but a sequence-to-sequence model reads the prompt as one text; plain or auto "
                "would do"
            )
        if supervise == "all":
            raise ConfigError(
                "data.supervise: is all, but a sequence-to-sequence model predicts no token of the prompt, which its "
                "encoder reads; answer would do"
            )
        super().__init__(tokenizer, max_length=max_length, template="plain", long_answers=long_answers)
        self.start = start
        before, after = around(lambda text, special: tokenizer(text, add_special_tokens=special)["input_ids"])
        self._stops, self._begin, self._end = self._end, before, after  # the last two of a prompt
        before, after = around(
            lambda text, special: tokenizer(text_target=text, add_special_tokens=special)["input_ids"]
        )
        self._opens = before
        self._ends = after if set(after) & set(self._stops) else [*after, *self._stops]

    @property
    def stop_ids(self) -> list[int]:
        return list(self._stops)

    def encode_all(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Rows of many examples, in order: ``encoder_ids``, ``input_ids``, ``labels`` and ``row``.

        A text is an answer without a prompt, as lm-evaluation-harness measures it: the decoder's tokens are those that
        the tokenizer makes of it as an input, and the encoder reads :func:`~holdfast.models.seq2seq.empty_prompt`. One
        longer than ``max_length`` gives several rows; before the later ones, the encoder reads the token before them.
        """
        sequences = [(example, n, pieces) for example in examples for n, pieces in enumerate(self._pieces(example))]
        rows: list[dict[str, Any]] = []
        tokenised = self._tokenise([pieces for _, _, pieces in sequences])
        longest = self._longest_answer(sequences, tokenised)
        for (example, number, pieces), tokens in zip(sequences, tokenised, strict=True):
            if example.text is not None:
                rows += self._text_rows(example, tokens[0].ids)
            elif pieces[-1].supervised:
                prompt = self._prompt(example, number, pieces, tokens)
                rows.append(self._answered(example, prompt, self._whole(example, tokens[-1].ids)))
            elif not any(piece.supervised for of, _, own in sequences if of is example for piece in own):
                raise DataError(f"{where(example.file, example.row)}: nothing left to supervise")
        self.tally.longest = max(self.tally.longest, longest)
        return rows

    def choice(self, example: Example, *, end: bool) -> dict[str, Any]:
        """As :meth:`Encoder.choice`. Without an end, the tokenizer puts nothing before the answer either."""
        sequences = self._pieces(example)
        pieces = sequences[-1] if end else self._without_end(sequences[-1], example.answer)
        [tokens] = self._tokenise([pieces])
        answer = tokens[-1].ids
        if end:
            prompt = self._prompt(example, len(sequences) - 1, pieces, tokens)
            return self._answered(example, prompt, self._whole(example, answer))
        prompt, _ = self._joined(pieces[:-1], [part.ids for part in tokens[:-1]])
        if len(prompt) > self.max_length:
            self.tally.shortened.add((example.file, example.row))
        if len(answer) >= self.max_length:
            raise DataError(self._too_long(example, len(answer)))
        return self._answered(example, prompt[-self.max_length :], answer)

    def prompt(self, example: Example, reserve: int) -> list[int]:
        """What the encoder reads, in ``max_length`` tokens; the response takes none of them."""
        sequences = self._pieces(example)
        [tokens] = self._tokenise([sequences[-1]])
        return self._prompt(example, len(sequences) - 1, sequences[-1], tokens)

    def fits(self, example: Example, reserve: int) -> bool:
        """Whether nothing of what stands before the last answer has to be cut."""
        pieces = self._pieces(example)[-1]
        [tokens] = self._tokenise([pieces])
        whole, _ = self._joined(pieces[:-1], [part.ids for part in tokens[:-1]])
        return len(whole) <= self.max_length

    def asked(self, prompt: list[int]) -> dict[str, list[int]]:
        return answered_row(prompt, [], self.start)

    def of_text(self, row: dict[str, Any]) -> dict[str, Any]:
        return text_row(row, self.start, empty_prompt(self.tokenizer))

    # --- text ---

    def _pieces(self, example: Example) -> list[list[Piece]]:
        """Of each answer what stands before it, and the answer without the space before it."""
        if example.text is not None:
            return [[Piece(example.text, supervised=True)]]
        plain = plain_pieces(example)
        answers = [turn.content for turn in example.turns if turn.role == "assistant"]
        sequences = []
        for number, answer in enumerate(answers):
            *before, question = (replace(p, ends=False, supervised=False) for p in plain[: 2 * number + 1])
            own = replace(plain[2 * number + 1], text=answer, ends=False)
            sequences.append([*before, replace(question, ends=True), own])
        return sequences

    def _without_end(self, pieces: list[Piece], answer: str) -> list[Piece]:
        question = pieces[-2]
        text = question.text.rstrip()
        space = question.text[len(text) :] + " "
        return [*pieces[:-2], replace(question, text=text), replace(pieces[-1], text=space + answer)]

    # --- tokens ---

    def _tokenise(self, sequences: list[list[Piece]]) -> list[list[Any]]:
        """Each prompt's pieces as one text, and each answer as another."""
        parts = super()._tokenise([part for pieces in sequences for part in (pieces[:-1], pieces[-1:])])
        return [[*prompt, *answer] for prompt, answer in zip(parts[::2], parts[1::2], strict=True)]

    def _answer_length(self, pieces: Sequence[Piece], tokens: Sequence[Any]) -> int:
        return len(self._opens) + len(tokens[-1]) + len(self._ends)

    def _prompt(self, example: Example, number: int, pieces: list[Piece], tokens: list[Any]) -> list[int]:
        """The tokens that the encoder reads, in ``max_length``; where they are too many, without the middle of spans
        that may be cut."""
        before = pieces[:-1]
        return self._joined(before, self._fit(example, number, before, tokens[:-1], reserve=0))[0]

    def _whole(self, example: Example, answer: list[int]) -> list[int]:
        """An answer with the tokens around it, in ``max_length`` with the decoder's start token.

        Raises:
            DataError: it is too long, and is not to be cut.
        """
        whole = [*self._opens, *answer, *self._ends]
        if len(whole) < self.max_length:
            return whole
        if not self._cuts_answers:
            raise DataError(self._too_long(example, len(whole)))
        self.tally.shortened.add((example.file, example.row))
        self.tally.cut.add((example.file, example.row))
        return whole[: self.max_length - 1]

    def _too_long(self, example: Example, length: int) -> str:
        return (
            f"{where(example.file, example.row)}: its answer has {length} tokens, more than the {self.max_length - 1} "
            f"of data.max_length={self.max_length} less the decoder's start token; raise data.max_length, or shorten "
            "the answer; data.long_answers=cut cuts its end"
        )

    def _answered(self, example: Example, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        if not answer:
            raise DataError(f"{where(example.file, example.row)}: nothing left to supervise")
        return answered_row(prompt, answer, self.start) | {"row": example.row}

    def _text_rows(self, example: Example, text: list[int]) -> list[dict[str, Any]]:
        if not text:
            raise DataError(f"{where(example.file, example.row)}: nothing left to supervise")
        ids, prompt, rows = [*self._begin, *text, *self._end], empty_prompt(self.tokenizer), []
        for first in range(0, len(ids), self.max_length - 1):
            window = ids[first : first + self.max_length - 1]
            rows.append(self._answered(example, prompt, window))
            prompt = window[-1:]
        return rows


def encoder_of(
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    sight: Sight | None = None,
    *,
    max_length: int,
    **options: Any,
) -> Encoder:
    """The encoder of rows for a model.

    Args:
        sight: how the model sees; None: it reads text alone.
        options: of :class:`Encoder`.

    Raises:
        ConfigError: an option does not suit the model.
    """
    if is_seq2seq(model_config):
        return ApartEncoder(tokenizer, max_length=max_length, start=decoder_start(model_config), **options)
    if sight is not None:
        return SeeingEncoder(tokenizer, sight=sight, max_length=max_length, **options)
    return Encoder(tokenizer, max_length=max_length, **options)
