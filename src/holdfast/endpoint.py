"""An OpenAI-compatible endpoint: conversations go in, texts come out, several at a time, again where it failed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx2

from holdfast.errors import ConfigError

PAUSE = 0.5  # seconds before the second attempt; doubled before each further one, up to LONGEST_PAUSE
LONGEST_PAUSE = 30.0
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)

Conversation = Sequence[dict[str, str]]
"""Turns of ``role`` and ``content``."""


class Endpoint:
    """A chat model behind ``POST {url}/chat/completions``.

    Args:
        url: the endpoint's base, for example http://localhost:8000/v1.
        model: its name there.
        key_variable: environment variable that holds the key; where it is not set, none is sent.
        concurrency: requests under way at once.
        timeout: seconds that a request may take.
        retries: how often a request is repeated that found no server, took too long, or was answered with a status
            that passes (408, 409, 425, 429, 5xx); the pauses between grow from half a second to half a minute.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
    ):
        self.url, self.model = url.rstrip("/"), model
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        key = os.environ.get(key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def chat(
        self,
        conversations: Sequence[Conversation],
        on_answer: Callable[[int, str], None] | None = None,
        **parameters: Any,
    ) -> list[str]:
        """The model's answer to each conversation, in order.

        Args:
            on_answer: called with the number of a conversation and its answer as soon as it is there.
            parameters: of the request, for example temperature and max_tokens.

        Raises:
            ConfigError: a request was refused, or failed ``retries`` + 1 times.
        """
        texts: list[str] = [""] * len(conversations)
        with (
            httpx2.Client(headers=self._headers, timeout=self._timeout) as client,
            ThreadPoolExecutor(self._concurrency) as pool,
        ):
            futures = {pool.submit(self._ask, client, turns, parameters): i for i, turns in enumerate(conversations)}
            try:
                for future in as_completed(futures):
                    i = futures[future]
                    texts[i] = future.result()
                    if on_answer is not None:
                        on_answer(i, texts[i])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return texts

    def _ask(self, client: httpx2.Client, conversation: Conversation, parameters: dict[str, Any]) -> str:
        body = {"model": self.model, "messages": list(conversation)} | parameters
        pause = PAUSE
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            try:
                reply = client.post(f"{self.url}/chat/completions", json=body)
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise ConfigError(f"endpoint {self.url!r}: is no URL that can be asked: {error}") from None
            except httpx2.TransportError as error:
                problem = f"no answer: {error or type(error).__name__}"
                continue
            if reply.is_success:
                return self._text(reply)
            problem = f"status {reply.status_code}: {reply.text.strip()[:200]}"
            if reply.status_code not in TRY_AGAIN:
                raise ConfigError(f"endpoint {self.url!r}, model {self.model!r}: {problem}")
        attempts = self._retries + 1
        raise ConfigError(f"endpoint {self.url!r}, model {self.model!r}: {problem}; {attempts} attempts were made")

    def _text(self, reply: httpx2.Response) -> str:
        try:
            return reply.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError):
            raise ConfigError(
                f"endpoint {self.url!r}: answered with something else than a chat completion: {reply.text[:200]!r}"
            ) from None
