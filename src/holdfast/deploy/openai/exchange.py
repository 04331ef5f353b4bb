"""One request: its sequences, and its response, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import torch

from holdfast.deploy.openai.answers import chat_logprobs, completion_logprobs, usage
from holdfast.deploy.openai.errors import RequestError
from holdfast.deploy.openai.prompts import Prompt, Prompts
from holdfast.deploy.openai.request import Body, ChatBody, CompletionBody
from holdfast.deploy.openai.text import Answer, Shown, Told, told_prompt
from holdfast.models.batcher import Batcher, Job, TokenLogprob

logger = logging.getLogger("holdfast")


@dataclass(frozen=True)
class Backend:
    """What answers requests.

    Attributes:
        name: of the model, which says the run and the stage.
        stage: its number; 0 is before training.
        listed: the name under which it is listed; of a server that follows a run, the run's.
        prompts: reads prompts.
        batcher: generates.
        threads: likelihoods of prompts are computed in them.
    """

    name: str
    stage: int
    listed: str
    prompts: Prompts
    batcher: Batcher
    threads: Executor


class Exchange:
    """A request's sequences, from the first token to its response; made in the event loop that answers it."""

    def __init__(self, backend: Backend, request: Body, prompts: Sequence[Prompt]):
        self.backend, self.request, self.prompts = backend, request, prompts
        self.chat = isinstance(request, ChatBody)
        self._echo = isinstance(request, CompletionBody) and request.echo
        self._told = request.logprobs is not None and request.logprobs is not False  # type: ignore[attr-defined]
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": backend.name,
        }
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Shown | BaseException]] = asyncio.Queue()
        self._answers: list[Answer] = []
        self._ends: list[asyncio.Future[None]] = []
        self._jobs: list[Job] = []
        self._cancelled = False
        for prompt in prompts:
            for _ in range(request.candidates):
                self._prepare(prompt)
        self.prompts = [replace(prompt, pictures=()) for prompt in prompts]  # the jobs hold them, to their end

    def start(self) -> None:
        """Begin to generate."""
        self.backend.batcher.submit(self._jobs)

    def cancel(self) -> None:
        """Leave what is not complete."""
        self._cancelled = True
        for job in self._jobs:
            job.cancel()
        self._jobs = []

    async def whole(self) -> dict[str, Any]:
        """The response.

        Raises:
            RequestError: it could not be generated.
        """
        prelude = await self._preludes()
        try:
            await asyncio.gather(*self._ends)
        except Exception as error:
            raise _failure(error) from error
        n = self.request.n
        choices: list[dict[str, Any]] = []
        for number, (prompt, (text, logprobs)) in enumerate(zip(self.prompts, prelude, strict=True)):
            answers = self._answers[number * self.request.candidates :][: self.request.candidates]
            if len(answers) > n:
                answers = sorted(answers, key=lambda answer: -answer.mean_logprob)[:n]
            for answer in answers:
                choice = self._choice(len(choices), prompt, answer, text, logprobs)
                choices.append(choice)
        return self._head | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The data of the events of a stream."""
        ended = 0
        sent = [(0, 0)] * len(self._answers)
        for number, (text, logprobs) in enumerate(await self._preludes()):
            for index in range(number * self.request.n, (number + 1) * self.request.n):
                if self.chat:
                    yield self._event([{"index": index, "delta": {"role": "assistant", "content": ""}} | _OPEN])
                elif self._echo:
                    yield self._event([{"index": index, "text": text} | _OPEN | {"logprobs": logprobs}])
        for index, answer in enumerate(self._answers):
            if answer.finish is not None and not self.prompts[index // self.request.n].max_tokens:
                self._news.put_nowait((index, answer.shown))
        while ended < len(self._answers):
            index, shown = await self._news.get()
            if isinstance(shown, BaseException):
                raise _failure(shown) from shown
            ended += shown.finish is not None
            characters, tokens = sent[index]
            new, told = shown.text[characters:], shown.told[tokens:]
            if new or shown.finish is not None or (told and self._told):
                sent[index] = (len(shown.text), len(shown.told))
                yield self._event([self._chunk(index, new, told, shown.finish)])
        if self.request.usage_in_stream:
            yield json.dumps(self._head | {"choices": [], "usage": self._usage()})
        yield "[DONE]"

    def _prepare(self, prompt: Prompt) -> None:
        number = len(self._answers)
        prompts = self.backend.prompts
        end: asyncio.Future[None] = self._loop.create_future()

        def tell(shown: Shown | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(self._news.put_nowait, (number, shown))

        def ended(error: BaseException | None) -> None:
            if error is not None and self.request.stream:
                tell(error)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_settle, end, None if self.request.stream else error)

        answer = Answer(
            prompts.decoder,
            prompt.before,
            ends=prompts.ends,
            stops=self.request.stops,
            max_tokens=prompt.max_tokens,
            drops_space=self.chat and not prompts.chat,
            on_change=tell if self.request.stream else None,
        )
        self._answers.append(answer)
        if prompt.max_tokens:
            sampling = self.request.sampling(number, prompts.vocabulary)
            held = prompt.pictures
            self._jobs.append(Job(prompt.ids, prompt.max_tokens, sampling, answer.take, ended, self, held))
            self._ends.append(end)
            end.add_done_callback(lambda future: future.cancelled() or future.exception())  # read, though nobody waits

    async def _preludes(self) -> list[tuple[str, dict[str, Any] | None]]:
        """What stands before the answers to each prompt: the echoed text and its log-probabilities."""
        if not self._echo:
            return [("", None)] * len(self.prompts)
        if not self._told:
            return [(prompt.text, None) for prompt in self.prompts]
        return await self._loop.run_in_executor(self.backend.threads, self._scored)

    def _scored(self) -> list[tuple[str, dict[str, Any] | None]]:
        top, decoder = self.request.top_logprobs_count or 0, self.backend.prompts.decoder
        scored: list[list[TokenLogprob]]
        try:
            scored = self.backend.batcher.logprobs([p.ids for p in self.prompts], top, lambda: self._cancelled)
        except Exception as error:
            raise _failure(error) from error
        return [
            (
                prompt.text,
                completion_logprobs(decoder, told_prompt(decoder, tokens, prompt.begin, len(prompt.text)), top),
            )
            for prompt, tokens in zip(self.prompts, scored, strict=True)
        ]

    def _choice(
        self, index: int, prompt: Prompt, answer: Answer, echoed: str, before: dict[str, Any] | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(answer.told, len(echoed))
        if before is not None and logprobs is not None:
            logprobs = {key: values + logprobs[key] for key, values in before.items()}
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": answer.finish}
        if self.chat:
            return choice | {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        return choice | {"text": echoed + answer.text}

    def _chunk(self, index: int, new: str, told: list[Told], finish: str | None) -> dict[str, Any]:
        offset = len(self.prompts[index // self.request.n].text) if self._echo else 0
        chunk = {"index": index, "logprobs": self._logprobs(told, offset), "finish_reason": finish}
        return chunk | ({"delta": {"content": new} if new else {}} if self.chat else {"text": new})

    def _logprobs(self, told: list[Told], offset: int) -> dict[str, Any] | None:
        if not self._told:
            return None
        decoder = self.backend.prompts.decoder
        if self.chat:
            return chat_logprobs(decoder, [one for one in told if one.token.id not in self.backend.prompts.ends])
        return completion_logprobs(decoder, told, self.request.top_logprobs_count or 0, offset)

    def _event(self, choices: list[dict[str, Any]]) -> str:
        head = self._head | ({"object": "chat.completion.chunk"} if self.chat else {})
        return json.dumps(head | {"choices": choices} | ({"usage": None} if self.request.usage_in_stream else {}))

    def _usage(self) -> dict[str, int]:
        return usage(sum(len(p.ids) for p in self.prompts), sum(answer.generated for answer in self._answers))


_OPEN: dict[str, Any] = {"logprobs": None, "finish_reason": None}


def _settle(end: asyncio.Future[None], error: BaseException | None) -> None:
    if end.done():
        return
    if error is None:
        end.set_result(None)
    else:
        end.set_exception(error)


def _failure(error: BaseException) -> RequestError:
    """What a client is told of a fault in here."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return RequestError("the machine's memory does not hold this request", status=503, kind="server_error")
    logger.error("a request failed", exc_info=error)
    return RequestError(f"the model failed: {str(error) or type(error).__name__}", status=500, kind="server_error")
