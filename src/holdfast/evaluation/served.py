"""Responses of a model behind an endpoint to test examples, many at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.api.task import PICTURE, Example, Turn
from holdfast.data.encode import Encoder
from holdfast.models.answers import Add, AnswerCache
from holdfast.models.endpoint import Endpoint, NoRouteError
from holdfast.models.pretrained import begin_tokens

if TYPE_CHECKING:
    from holdfast.system.progress import OnBatch

logger = logging.getLogger("holdfast")

Way = Callable[[Encoder, Sequence[Example], int, "OnBatch", AnswerCache], list[str]]
"""(encoder, examples, max_new_tokens, on_batch, answers) -> responses."""


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint.

    Prompts go to ``/completions`` as texts in the run's template. Their tokens are the same as in process if the
    tokenizer gives a decoded text its old tokens. A server without that route is asked by chat; its own template then
    makes the prompts, which are not cut. Where a question shows pictures, any server is asked so, and they are parts of
    its messages.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._ways: list[Way] = [self._complete, self._chat]

    def respond(
        self,
        encoder: Encoder,
        questions: Sequence[Example],
        max_new_tokens: int,
        on_batch: OnBatch,
        answers: AnswerCache,
    ) -> list[str]:
        """The model's greedy response to each example; ``answers`` saves them as they come.

        Raises:
            ConfigError: the endpoint cannot be asked, or fails again and again.
        """
        if any(question.pictures for question in questions):
            return self._chat(encoder, questions, max_new_tokens, on_batch, answers)
        while True:
            try:
                return self._ways[0](encoder, questions, max_new_tokens, on_batch, answers)
            except NoRouteError as error:
                if len(self._ways) == 1:
                    raise
                del self._ways[0]
                logger.warning("%s; asked by chat instead, where the server's own template makes the prompts", error)

    def _complete(
        self,
        encoder: Encoder,
        questions: Sequence[Example],
        max_new_tokens: int,
        on_batch: OnBatch,
        answers: AnswerCache,
    ) -> list[str]:
        prompts = [encoder.prompt(question, reserve=max_new_tokens) for question in questions]
        texts = [prompt_text(encoder, ids) for ids in prompts]
        tokenised = encoder.tokenizer(texts)["input_ids"] if texts else []
        if other := sum(a != b for a, b in zip(prompts, tokenised, strict=True)):
            logger.warning("%d of %d prompts reach the endpoint as other tokens than in process", other, len(prompts))
        return self._all(self.endpoint.complete, encoder, texts, texts, max_new_tokens, on_batch, answers)

    def _chat(
        self,
        encoder: Encoder,
        questions: Sequence[Example],
        max_new_tokens: int,
        on_batch: OnBatch,
        answers: AnswerCache,
    ) -> list[str]:
        turns = [[_message(turn) for turn in question.turns[:-1]] for question in questions]
        keys = [[_known_by(turn) for turn in question.turns[:-1]] for question in questions]
        return self._all(self.endpoint.chat, encoder, turns, keys, max_new_tokens, on_batch, answers)

    def _all(
        self,
        request: Callable[..., list[str]],
        encoder: Encoder,
        questions: Sequence[Any],
        keys: Sequence[Any],
        max_new_tokens: int,
        on_batch: OnBatch,
        answers: AnswerCache,
    ) -> list[str]:
        """Ask what has no answer yet; ``keys`` are what the answers are saved by."""

        def ask(left: list[int], add: Add) -> None:
            done = len(questions) - len(left)

            def on_answer(number: int, text: str) -> None:
                nonlocal done
                add([left[number]], [text])
                done += 1
                if on_batch is not None:
                    on_batch(done, len(questions))

            request([questions[i] for i in left], on_answer, temperature=0, max_tokens=max_new_tokens)

        texts = answers.complete([[request.__name__, key, max_new_tokens] for key in keys], ask)
        return [encoder.answer(text) for text in texts]


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as a message, with its pictures between the parts of its text."""
    if not turn.pictures:
        return {"role": turn.role, "content": turn.content}
    first, *texts = turn.content.split(PICTURE)
    parts: list[Any] = [first]
    for picture, text in zip(turn.pictures, texts, strict=True):
        parts += [picture, text]
    return {
        "role": turn.role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts if part != ""],
    }


def _known_by(turn: Turn) -> dict[str, Any]:
    shown = {"pictures": turn.shown} if turn.pictures else {}
    return {"role": turn.role, "content": turn.content} | shown


def prompt_text(encoder: Encoder, ids: list[int]) -> str:
    """The text of a prompt's tokens, without the begin token that the tokenizer puts before each text."""
    begin = begin_tokens(encoder.tokenizer)
    ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
