"""A client of an OpenAI-compatible endpoint: several requests at a time, with retries."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from base64 import b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import httpx2

from holdfast.errors import ConfigError
from holdfast.models.pictures import Picture, data_url
from holdfast.system.url import split_login

PAUSE = 0.5  # seconds before the second attempt; doubled for each further one, up to LONGEST_PAUSE
LONGEST_PAUSE = 30.0
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
NO_ROUTE = (404, 405, 501)
MOST_BYTES = 64 << 20  # of one answer

Conversation = Sequence[dict[str, Any]]
"""Turns of ``role`` and ``content``: text, or a list of texts and pictures."""
OnAnswer = Callable[[int, str], None] | None


class NoRouteError(ConfigError):
    """The endpoint does not have this route."""


class Endpoint:
    """A language model behind an OpenAI-compatible server.

    Args:
        url: the endpoint's base, for example http://localhost:8000/v1. A user name and a password in it are sent in
            place of a key (HTTP's basic authentication), and are no part of the attribute ``url`` or of messages.
        model: the model's name there.
        key_variable: environment variable that holds the key; if it is not set, no key is sent.
        concurrency: requests at the same time.
        timeout: seconds that a request may take from its beginning to the last byte of its answer.
        retries: how often a request is repeated if it finds no server, takes too long, or fails with a temporary status
            (408, 409, 425, 429, 5xx); the pauses grow from half a second to half a minute.

    Raises:
        ConfigError: the URL or the key cannot be used.
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
        if not timeout > 0:  # which nan is not, either
            raise ConfigError(f"timeout: must be more than 0 seconds, not {timeout}")
        self.model = model
        self.url, login = split_login(url)
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._headers = {"Content-Type": "application/json"}
        key = os.environ.get(key_variable, "").strip()
        if login is not None:
            self._headers["Authorization"] = f"Basic {b64encode(':'.join(login).encode()).decode()}"
        elif key:
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(f"{key_variable}: holds characters that a key cannot have")
            self._headers["Authorization"] = f"Bearer {key}"

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

        def names(reply: Any) -> list[str]:
            return [_text(model["id"]) for model in reply["data"]]

        found: list[list[str]] = []
        request = _Request("GET", "models", None, names, "a list of models")
        self._ask_all([request], lambda _, answer: found.append(answer))
        return found[0]

    def _all(
        self, route: str, bodies: Sequence[dict[str, Any]], on_answer: OnAnswer, choice: Callable[[Any], Any]
    ) -> list[str]:
        texts: list[str] = [""] * len(bodies)

        def answered(number: int, answer: str) -> None:
            texts[number] = answer
            if on_answer is not None:
                on_answer(number, answer)

        wanted = f"a {'chat ' * route.startswith('chat')}completion"
        requests = [
            _Request(
                "POST", route, {"model": self.model} | body, lambda reply: _text(choice(reply["choices"][0])), wanted
            )
            for body in bodies
        ]
        self._ask_all(requests, answered)
        return texts

    def _ask_all(self, requests: Sequence[_Request], answered: Callable[[int, Any], None]) -> None:
        """Ask in a thread with an event loop of its own; answers are taken in this one, as they come."""
        answers: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        asking = _Asking(self, requests, answers)
        threading.Thread(target=asking.run, name="holdfast endpoint", daemon=True).start()
        failure: Exception | None = None
        try:
            while (found := answers.get()) is not None:
                number, answer = found
                if isinstance(answer, Exception):
                    failure = failure or answer
                else:
                    answered(number, answer)
        finally:
            asking.stop()
        if failure is not None:
            raise failure

    async def ask(self, client: httpx2.AsyncClient, request: _Request, stop: asyncio.Event) -> Any:
        """The answer to one request, after pauses and further attempts where it needs them; none after ``stop``."""
        pause, problem = PAUSE, ""
        content = None if request.body is None else json.dumps(request.body, default=_part).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause)
                if stop.is_set():
                    break
                pause = min(2 * pause, LONGEST_PAUSE)
            try:
                async with asyncio.timeout(self._timeout):
                    status, reply = await self._reply(client, request, content)
            except TimeoutError:
                problem = f"no answer within {self._timeout:g} seconds"
                continue
            except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
                raise ConfigError(f"endpoint {self.url!r}: is no URL that can be asked: {error}") from None
            except httpx2.RequestError as error:
                problem = f"no answer: {str(error) or type(error).__name__}"
                continue
            if 200 <= status < 300:
                try:
                    return request.read(json.loads(reply))
                except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                    raise ConfigError(
                        f"endpoint {self.url!r}: answered with something else than {request.wanted}: {_shown(reply)}"
                    ) from None
            problem = f"status {status}: {_shown(reply)}"
            if status not in TRY_AGAIN:
                no_route = status in NO_ROUTE and b"model_not_found" not in reply
                raise (NoRouteError if no_route else ConfigError)(f"{self._named()}: {problem}")
        raise ConfigError(f"{self._named()}: {problem}; {attempt + 1} attempts were made")

    def client(self) -> httpx2.AsyncClient:
        """A client for several requests at a time; deadlines are not its own."""
        limits = httpx2.Limits(max_connections=self._concurrency)
        return httpx2.AsyncClient(headers=self._headers, timeout=None, limits=limits)

    @property
    def concurrency(self) -> int:
        """Requests at the same time."""
        return self._concurrency

    async def _reply(self, client: httpx2.AsyncClient, request: _Request, content: bytes | None) -> tuple[int, bytes]:
        reply = bytearray()
        async with client.stream(request.verb, f"{self.url}/{request.route}", content=content) as response:
            async for chunk in response.aiter_bytes():
                reply += chunk
                if len(reply) > MOST_BYTES:
                    raise ConfigError(f"{self._named()}: answered with more than {MOST_BYTES >> 20} MiB")
        return response.status_code, bytes(reply)

    def _named(self) -> str:
        return f"endpoint {self.url!r}" + (f", model {self.model!r}" if self.model else "")


def _part(picture: Any) -> dict[str, Any]:
    """A picture as a part of a message; its file is read when it is sent, so that those of many are not in memory."""
    if not isinstance(picture, Picture):
        raise TypeError(f"{type(picture).__name__} is no JSON")
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


@dataclass(frozen=True)
class _Request:
    """A request, and how its answer is read.

    Attributes:
        read: from the JSON of the answer; a KeyError, IndexError, TypeError or ValueError says that it is another.
        wanted: what the answer should be, for messages.
    """

    verb: str
    route: str
    body: dict[str, Any] | None
    read: Callable[[Any], Any]
    wanted: str


class _Asking:
    """Requests under way in a thread. Each answer or error goes to a queue with its number, and None at the end."""

    def __init__(self, endpoint: Endpoint, requests: Sequence[_Request], answers: SimpleQueue[tuple[int, Any] | None]):
        self._endpoint, self._requests, self._answers = endpoint, requests, answers
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def run(self) -> None:
        """Ask until all is answered, one fails, or somebody calls :meth:`stop`."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # its end waits for what looks up names
            try:
                runner.run(self._ask())
            except asyncio.CancelledError:
                pass
            except Exception as error:
                self._answers.put((-1, error))
            finally:
                self._answers.put(None)

    def stop(self) -> None:
        """Give up what is under way; from another thread."""
        self._stopped = True
        with suppress(RuntimeError):  # its loop is closed: nothing is under way
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    async def _ask(self) -> None:
        self._task = asyncio.current_task()
        if self._stopped:
            return
        stop, numbers = asyncio.Event(), iter(range(len(self._requests)))

        async def work() -> None:
            for number in numbers:
                if stop.is_set():
                    return
                try:
                    answer = await self._endpoint.ask(client, self._requests[number], stop)
                except Exception as error:
                    stop.set()
                    self._answers.put((number, error))
                else:
                    self._answers.put((number, answer))

        async with self._endpoint.client() as client:
            await asyncio.gather(*(work() for _ in range(min(self._endpoint.concurrency, len(self._requests)))))


def _text(value: Any) -> str:
    """The text of an answer: text, nothing, or parts of text; half characters are replaced.

    Raises:
        TypeError: it is something else.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_text(part["text"]) for part in value if part["type"] in ("text", "output_text"))
    if not isinstance(value, str):
        raise TypeError
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown(reply: bytes) -> str:
    """The beginning of an answer, for a message."""
    return repr(reply[:200].decode("utf-8", "replace").strip())


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
