"""A prompt in which the row's own answer is shown: what a teacher reads that knows the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from holdfast.api.rows import TokenRow, last_answer
from holdfast.api.task import Example, Turn
from holdfast.data.chat import render
from holdfast.data.encode import Encoder
from holdfast.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T", int, str)

PLACE = "{demonstration}"
LONG = 1 << 20  # tokens; nothing here is cut


class Shown(NamedTuple):
    """The tokens that a row's answer is asked with, alone and with the answer shown."""

    prompt: list[int]
    demonstrated: list[int]


class Demonstration:
    """Shows a row's answer in its prompt: in a chat at the end of the user's last words, else at the prompt's end.

    Args:
        tokenizer: the model's.
        text: what is added, with ``{demonstration}`` in the answer's place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str):
        self.encoder, self.tokenizer, self.text = Encoder(tokenizer, max_length=LONG), tokenizer, text
        self.frames = chat_frames(self.encoder)
        known = tokenizer.added_tokens_decoder
        self._marks = {token for token in known if known[token].special} - {tokenizer.eos_token_id}

    def show(self, row: TokenRow) -> Shown:
        """The prompt of a row's last answer, and the same with this answer in it.

        Raises:
            DataError: the row has no prompt or no answer, or does not show where the user's words end.
        """
        prompt, answer = asked(row, self.tokenizer)
        said = self.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        end = next((frame.end for frame in self.frames if frame.ends(prompt)), [])
        if self.frames and not end and not self._marks.isdisjoint(prompt[1:]):
            raise DataError(
                "its prompt does not end with the user's words in the tokenizer's chat template (but with a tool's "
                "answer, say), so that nothing shows where the demonstration belongs"
            )
        cut = len(prompt) - len(end)
        return Shown(prompt, prompt[:cut] + self.encoder.inside(self.text.replace(PLACE, said)) + end)

    def check(self, rows: Sequence[TokenRow], describe: Callable[[int], str], context: int | None) -> None:
        """Try all rows.

        Args:
            describe: how a message names a row, given by number from 0.
            context: tokens that the model reads at most, if it says so.

        Raises:
            DataError: a row cannot be shown, or leaves no room for an answer.
        """
        for number, row in enumerate(rows):
            try:
                length = len(self.show(row).demonstrated)
            except DataError as error:
                raise DataError(f"{describe(number)}: {error}") from None
            if context is not None and length >= context:
                raise DataError(
                    f"{describe(number)}: with its answer shown, its prompt has {length} tokens, which leaves no room "
                    f"for another answer in the model's context of {context}; shorten the row, or leave it out"
                )


def asked(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The prompt and the answer of a row; DataError if it has not both."""
    prompt, answer = last_answer(row)
    if not prompt or not answer or prompt == [tokenizer.bos_token_id]:
        raise DataError(
            "has no prompt before its answer: it is a text, or all of its tokens are supervised (data.supervise: all); "
            "a row of a prompt and an answer would do"
        )
    return prompt, answer


class Frame(NamedTuple):
    """The tokens of a chat template around the user's words in a prompt."""

    head: list[int]
    end: list[int]

    def ends(self, prompt: list[int]) -> bool:
        """Whether a prompt ends so."""
        return bool(self.end) and prompt[-len(self.end) :] == self.end


def chat_frames(encoder: Encoder) -> list[Frame]:
    """How the chat template frames the user's words: as a run writes prompts, and as the template does by default.

    Empty where there is no chat template.
    """
    if not encoder.chat:
        return []
    tokenizer, found = encoder.tokenizer, list[Frame]()
    words = ("question", "42")
    ours = [encoder.prompt(Example("", 0, (Turn("user", said), Turn("assistant", "answer"))), 0) for said in words]
    messages = [[{"role": "user", "content": said}] for said in words]
    texts = [render(tokenizer, one, add_generation_prompt=True) for one in messages]
    theirs = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for prompts in (ours, theirs):
        found.append(Frame(common_start(prompts), common_end(prompts)))
    return sorted(found, key=lambda frame: len(frame.end), reverse=True)


def common_start(parts: Sequence[list[T]]) -> list[T]:
    """The longest beginning that all of some lists have, at least one."""
    first, last = min(parts), max(parts)
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def common_end(parts: Sequence[list[T]]) -> list[T]:
    """The longest end that all of some lists have, at least one."""
    return common_start([part[::-1] for part in parts])[::-1]
