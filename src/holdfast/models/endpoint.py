"""A client of an OpenAI-compatible endpoint: several requests at a time, with retries."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx2

from holdfast.errors import ConfigError

PAUSE = 0.5  # seconds before the second attempt; doubled for each further one, up to LONGEST_PAUSE
LONGEST_PAUSE = 30.0
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
NO_ROUTE = (404, 405, 501)

Conversation = Sequence[dict[str, str]]
"""Turns of ``role`` and ``content``."""
OnAnswer = Callable[[int, str], None] | None


class NoRouteError(ConfigError):
    """The endpoint does not have this route."""


class Endpoint:
    """A language model behind an OpenAI-compatible server.

    Args:
        url: the endpoint's base, for example http://localhost:8000/v1.
        model: the model's name there.
        key_variable: environment variable that holds the key; if it is not set, no key is sent.
        concurrency: requests at the same time.
        timeout: seconds that a request may take.
        retries: how often a request is repeated if it finds no server, takes too long, or fails with a temporary status
            (408, 409, 425, 429, 5xx); the pauses grow from half a second to half a minute.
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
        on_answer: OnAnswer = None,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> list[str]:
        """The model's answer to each conversation, in order, by ``POST {url}/chat/completions``.

        Args:
            on_answer: called with the number of a conversation and its answer as soon as it is there; it may raise to
                stop.
            temperature, max_tokens: of the request; the server's own where absent.

        Raises:
            ConfigError: a request was refused, or failed ``retries`` + 1 times. The answers of requests that have begun
                still go to ``on_answer``; no further request begins.
        """
        bodies = [{"messages": list(turns)} | _given(temperature, max_tokens) for turns in conversations]
        return self._all("chat/completions", bodies, on_answer, lambda choice: choice["message"]["content"])

    def complete(
        self,
        prompts: Sequence[str],
        on_answer: OnAnswer = None,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> list[str]:
        """The model's continuation of each prompt, in order, by ``POST {url}/completions``; else as :meth:`chat`."""
        bodies = [{"prompt": prompt} | _given(temperature, max_tokens) for prompt in prompts]
        return self._all("completions", bodies, on_answer, lambda choice: choice["text"])

    def models(self) -> list[str]:
        """The names of the models that the endpoint serves, by ``GET {url}/models``.

        Raises:
            ConfigError: it does not answer, or not with a list of models.
        """
        with self._client() as client:
            reply = self._ask(client, "GET", "models", None, threading.Event())
        try:
            return [model["id"] for model in reply.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise self._something_else("a list of models", reply) from None

    def _client(self) -> httpx2.Client:
        limits = httpx2.Limits(max_connections=self._concurrency)
        return httpx2.Client(headers=self._headers, timeout=self._timeout, limits=limits)

    def _all(
        self, route: str, bodies: Sequence[dict[str, Any]], on_answer: OnAnswer, text: Callable[[Any], str | None]
    ) -> list[str]:
        texts: list[str] = [""] * len(bodies)
        stop, failure = threading.Event(), None

        def answer(client: httpx2.Client, body: dict[str, Any]) -> str:
            reply = self._ask(client, "POST", route, {"model": self.model} | body, stop)
            try:
                return text(reply.json()["choices"][0]) or ""
            except (ValueError, KeyError, IndexError, TypeError):
                raise self._something_else(f"a {'chat ' * route.startswith('chat')}completion", reply) from None

        with self._client() as client, ThreadPoolExecutor(self._concurrency) as pool:
            futures = {pool.submit(answer, client, body): i for i, body in enumerate(bodies)}
            try:
                for future in as_completed(futures):
                    if future.cancelled():
                        continue
                    error = future.exception()
                    if error is None:
                        texts[futures[future]] = future.result()
                        if on_answer is not None:
                            on_answer(futures[future], texts[futures[future]])
                    elif failure is None:
                        failure = error
                        stop.set()
                        for other in futures:
                            other.cancel()
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure
        return texts

    def _ask(
        self, client: httpx2.Client, verb: str, route: str, body: dict[str, Any] | None, stop: threading.Event
    ) -> httpx2.Response:
        pause, problem = PAUSE, ""
        for attempt in range(self._retries + 1):
            if attempt:
                if stop.wait(pause):
                    break
                pause = min(2 * pause, LONGEST_PAUSE)
            try:
                reply = client.request(verb, f"{self.url}/{route}", json=body)
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise ConfigError(f"endpoint {self.url!r}: is no URL that can be asked: {error}") from None
            except httpx2.TransportError as error:
                problem = f"no answer: {error or type(error).__name__}"
                continue
            if reply.is_success:
                return reply
            problem = f"status {reply.status_code}: {reply.text.strip()[:200]}"
            if reply.status_code not in TRY_AGAIN:
                kind = NoRouteError if reply.status_code in NO_ROUTE else ConfigError
                raise kind(f"{self._named()}: {problem}")
        raise ConfigError(f"{self._named()}: {problem}; {attempt + 1} attempts were made")

    def _named(self) -> str:
        return f"endpoint {self.url!r}" + (f", model {self.model!r}" if self.model else "")

    def _something_else(self, than: str, reply: httpx2.Response) -> ConfigError:
        return ConfigError(f"endpoint {self.url!r}: answered with something else than {than}: {reply.text[:200]!r}")


def _given(temperature: float | None, max_tokens: int | None) -> dict[str, float]:
    """The parameters of a request that are not absent."""
    parameters = {"temperature": temperature, "max_tokens": max_tokens}
    return {name: value for name, value in parameters.items() if value is not None}


def only_model(endpoint: Endpoint) -> str:
    """The name of the only model that an endpoint serves.

    Raises:
        ConfigError: it serves none or several, does not say which, or does not answer.
    """
    try:
        names = endpoint.models()
    except NoRouteError:
        raise ConfigError(f"--model: endpoint {endpoint.url!r} does not say what it serves; name the model") from None
    if len(names) != 1:
        raise ConfigError(f"--model: endpoint {endpoint.url!r} serves {', '.join(names) or 'no model'}; name one")
    return names[0]
