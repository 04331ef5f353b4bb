"""Test examples asked of a model behind an endpoint, many at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from holdfast.api.task import Example
from holdfast.data.encode import Encoder
from holdfast.models.answers import Add, AnswerCache
from holdfast.models.endpoint import Endpoint, NoRouteError
from holdfast.models.pretrained import begin_tokens

if TYPE_CHECKING:
    from holdfast.system.progress import OnBatch

logger = logging.getLogger("holdfast")


class EndpointModel:
    """A model behind an OpenAI-compatible endpoint.

    Prompts go as text to ``/completions``, as the run renders them: the same tokens as in process, wherever the
    tokenizer makes of a text the tokens that it came from. A server without that route is asked by chat, so that its
    own template makes the prompts, and nothing is cut from them.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._ways: list[Callable[..., list[str]]] = [self._complete, self._chat]

    def respond(
        self,
        encoder: Encoder,
        asked: Sequence[Example],
        max_new_tokens: int,
        on_batch: OnBatch,
        kept: AnswerCache,
    ) -> list[str]:
        """The model's response to each example, greedy; answers are kept as they come.

        Raises:
            ConfigError: the endpoint cannot be asked, or fails again and again.
        """
        while True:
            try:
                return self._ways[0](encoder, asked, max_new_tokens, on_batch, kept)
            except NoRouteError as error:
                if len(self._ways) == 1:
                    raise
                del self._ways[0]
                logger.warning("%s; asked by chat instead, where the server's own template makes the prompts", error)

    def _complete(
        self, encoder: Encoder, asked: Sequence[Example], max_new_tokens: int, on_batch: OnBatch, kept: AnswerCache
    ) -> list[str]:
        prompts = [encoder.prompt(example, reserve=max_new_tokens) for example in asked]
        texts = [prompt_text(encoder, ids) for ids in prompts]
        tokenised = encoder.tokenizer(texts)["input_ids"] if texts else []
        if other := sum(a != b for a, b in zip(prompts, tokenised, strict=True)):
            logger.warning("%d of %d prompts reach the endpoint as other tokens than in process", other, len(prompts))
        return self._all(self.endpoint.complete, texts, max_new_tokens, on_batch, kept)

    def _chat(
        self, encoder: Encoder, asked: Sequence[Example], max_new_tokens: int, on_batch: OnBatch, kept: AnswerCache
    ) -> list[str]:
        turns = [[{"role": t.role, "content": t.content} for t in example.turns[:-1]] for example in asked]
        return self._all(self.endpoint.chat, turns, max_new_tokens, on_batch, kept)

    def _all(
        self,
        request: Callable[..., list[str]],
        questions: Sequence[Any],
        max_new_tokens: int,
        on_batch: OnBatch,
        kept: AnswerCache,
    ) -> list[str]:
        def ask(left: list[int], add: Add) -> None:
            done = len(questions) - len(left)

            def on_answer(number: int, text: str) -> None:
                nonlocal done
                add([left[number]], [text])
                done += 1
                if on_batch is not None:
                    on_batch(done, len(questions))

            request([questions[i] for i in left], on_answer, temperature=0, max_tokens=max_new_tokens)

        found = kept.complete([[request.__name__, question, max_new_tokens] for question in questions], ask)
        return [text.strip() for text in found]


def prompt_text(encoder: Encoder, ids: list[int]) -> str:
    """The text of a prompt's tokens, without the begin token that a tokenizer puts before each text."""
    begin = begin_tokens(encoder.tokenizer)
    ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
