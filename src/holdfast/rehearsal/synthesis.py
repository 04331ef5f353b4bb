"""New prompts of a task, which a model writes after some rows of it (in-context learning)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.api.rows import IGNORED, TokenRow, last_answer
from holdfast.data.encode import Encoder
from holdfast.errors import DataError
from holdfast.models.pretrained import begin_tokens
from holdfast.rehearsal.demonstration import LONG, asked, chat_frames, common_end, common_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def usable(
    rows: Sequence[TokenRow], tokenizer: PreTrainedTokenizerBase, describe: Callable[[int], str]
) -> list[TokenRow]:
    """The rows of one question and its answer; of longer conversations nothing can be written.

    Raises:
        DataError: a row has no prompt or no answer, or all are longer conversations.
    """
    found = list[TokenRow]()
    ends = [frame.end for frame in chat_frames(Encoder(tokenizer, max_length=LONG)) if frame.end]
    for number, row in enumerate(rows):
        try:
            prompt, _ = asked(row, tokenizer)
        except DataError as error:
            raise DataError(f"{describe(number)}: {error}") from None
        end = next((end for end in ends if prompt[-len(end) :] == end), [])
        answered = any(label != IGNORED for label in row["labels"][1 : len(prompt)])
        if not answered and not (end and _stands_in(end, prompt[: -len(end)])):
            found.append(row)
    if rows and not found:
        raise DataError(
            f"{describe(0)}: is a conversation of several turns, as all rows of its task are; rows of one question and "
            "its answer would do"
        )
    return found


@dataclass(frozen=True)
class Form:
    """What the rows of a task have in common, and how they are written as text.

    Attributes:
        encoder: of texts.
        head, tail: the tokens that every prompt begins and ends with; the input stands between them.
        space: white space before and after every input.
        said: what every prompt says, without what the chat template puts around the user's words.
        end: the tokens after the text of an answer.
        marks: what stands before an input, and before an answer.
    """

    encoder: Encoder
    head: list[int]
    tail: list[int]
    space: tuple[str, str]
    said: str
    end: list[int]
    marks: tuple[str, str]

    @classmethod
    def of(cls, rows: Sequence[TokenRow], encoder: Encoder, marks: tuple[str, str]) -> Form:
        """The form of some rows, each with a prompt and an answer."""
        prompts = [last_answer(row)[0] for row in rows]
        frames = [frame for frame in chat_frames(encoder) if all(map(frame.ends, prompts))]
        own_head, own_tail = frames[0] if frames else (begin_tokens(encoder.tokenizer), [])
        if any(prompt[: len(own_head)] != own_head for prompt in prompts):
            own_head = []
        head, tail = common_start(prompts), common_end(prompts)
        if any(len(prompt) <= len(head) + len(tail) for prompt in prompts):  # in some, nothing is left between them
            head, tail = own_head, own_tail
        inputs = [_text(encoder, prompt[len(head) : len(prompt) - len(tail)]) for prompt in prompts]
        before = common_start([list(text[: len(text) - len(text.lstrip())]) for text in inputs])
        after = common_end([list(text[len(text.rstrip()) :]) for text in inputs])
        shared = head[len(own_head) :], tail[: len(tail) - len(own_tail)]
        said = "\n".join(filter(None, (_text(encoder, part).strip() for part in shared)))
        answer, stops = last_answer(rows[0])[1], set(encoder.stop_ids)
        cut = next((place for place, token in enumerate(answer) if token in stops), len(answer))
        return cls(encoder, head, tail, ("".join(before), "".join(after)), said, answer[cut:], marks)

    def input(self, row: TokenRow) -> str:
        """The input of a row, as text."""
        prompt = last_answer(row)[0]
        return _text(self.encoder, prompt[len(self.head) : len(prompt) - len(self.tail)]).strip()

    def prompt(self, text: str) -> list[int]:
        """The prompt with this input."""
        before, after = self.space
        return self.head + self.encoder.inside(before + text + after) + self.tail

    def row(self, prompt: Sequence[int], answer: Sequence[int]) -> TokenRow:
        """The row of a prompt and an answer without its end."""
        answered = [*answer, *self.end]
        return {"input_ids": [*prompt, *answered], "labels": [IGNORED] * len(prompt) + answered}

    def request(self, rows: Sequence[TokenRow]) -> list[int]:
        """The tokens after which a model writes a further row: what all say, these rows, and the mark of an input."""
        parts = [self.said, *(self.written(row) for row in rows), self.marks[0]]
        text = "\n\n".join(part for part in parts if part)
        return begin_tokens(self.encoder.tokenizer) + self.encoder.inside(text)

    def written(self, row: TokenRow) -> str:
        """A row as text."""
        mark, answer_mark = self.marks
        answer = _text(self.encoder, last_answer(row)[1]).strip()
        return f"{mark} {self.input(row)}\n{answer_mark} {answer}"

    def read(self, generated: Sequence[int]) -> list[str]:
        """The inputs in what was generated after :meth:`request`, each with the mark of an answer after it."""
        mark, answer_mark = self.marks
        parts = [part.split(answer_mark) for part in _text(self.encoder, generated).split(mark)]
        return [part[0].strip() for part in parts if len(part) == 2 and part[0].strip()]


def _text(encoder: Encoder, ids: Sequence[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _stands_in(part: list[int], whole: list[int]) -> bool:
    return any(whole[place : place + len(part)] == part for place in range(len(whole) - len(part) + 1))
