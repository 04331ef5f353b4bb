"""The HTTP interface: routes, limits, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from holdfast.deploy.openai.errors import RequestError
from holdfast.deploy.openai.exchange import Backend, Exchange
from holdfast.deploy.openai.limits import Limits
from holdfast.deploy.openai.prompts import Prompt
from holdfast.deploy.openai.request import MOST_ANSWERS, Body, read_chat, read_completion, read_json

BODY_SECONDS = 60.0  # in which a request's body must be here
READ_SECONDS = 10.0  # beyond the time of a request, in which a client must have read the rest of a stream


@dataclass
class Served:
    """What answers requests, and how many of them it has now.

    Attributes:
        inside: requests that are answered now or wait.
    """

    backend: Backend
    inside: int = 0


class Service:
    """The routes of a server.

    Attributes:
        served: what answers the requests that come now.
        inside: requests that are answered now or wait, by this or a former model.
    """

    def __init__(self, backend: Backend, limits: Limits):
        self.served, self.limits = Served(backend), limits
        self.inside = 0
        self._lock = threading.Lock()

    def exchange(self, backend: Backend) -> Served:
        """Answer the requests that come from now on with another model; any thread may call this.

        Returns:
            what answered until now, and still answers the requests that it has.
        """
        with self._lock:
            former, self.served = self.served, Served(backend)
        return former

    def _enter(self) -> Served:
        with self._lock:
            self.inside += 1
            self.served.inside += 1
            return self.served

    def leave(self, served: Served) -> None:
        """A request that came in is answered, or left."""
        with self._lock:
            self.inside -= 1
            served.inside -= 1

    def application(self) -> Starlette:
        """As an ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self.health, methods=["GET"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name:path}", self.model, methods=["GET"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ],
            exception_handlers={
                RequestError: _refused,
                HTTPException: _no_route,
                ClientDisconnect: _left,
                Exception: _failed,
            },
        )

    async def health(self, _: Request) -> Response:
        """That the server answers, with which stage, and what it does."""
        backend = self.served.backend
        does = {"requests": self.inside, "sequences": backend.batcher.busy}
        return JSONResponse({"status": "ok", "model": backend.name, "stage": backend.stage} | does)

    async def models(self, _: Request) -> Response:
        """The only model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """The model of a name."""
        _check_model(request.path_params["name"], self.served.backend)
        return JSONResponse(self._described())

    async def completions(self, request: Request) -> Response:
        """Continuations of prompts."""
        return await self._answer(request, read_completion)

    async def chat(self, request: Request) -> Response:
        """Answers in a conversation."""
        return await self._answer(request, read_chat)

    async def _answer(self, request: Request, read: Callable[[dict[str, Any]], Body]) -> Response:
        limits, sees = self.limits, self.served.backend.prompts.sees
        raw = await self._body(request, limits.body_with_pictures if sees else limits.body)
        if self.inside >= self.limits.requests:
            raise RequestError(
                f"{self.inside} requests are being answered or wait; try again in a moment",
                status=429,
                code="rate_limit_exceeded",
                kind="rate_limit_error",
            )
        served = self._enter()
        try:
            deadline = asyncio.get_running_loop().time() + self.limits.seconds
            body, prompts = await asyncio.to_thread(self._read, raw, read, served.backend)
            return _Reply(self, served, Exchange(served.backend, body, prompts), deadline)
        except BaseException:
            self.leave(served)
            raise

    def _read(self, raw: bytes, read: Callable[[dict[str, Any]], Body], backend: Backend) -> tuple[Body, list[Prompt]]:
        body = read(read_json(raw))
        if body.model is not None:
            _check_model(body.model, backend)
        prompts = backend.prompts.of(body)
        if (answers := len(prompts) * body.candidates) > MOST_ANSWERS:
            key = "n" if body.candidates == body.n else "best_of"
            raise RequestError(f"{key}: makes {answers} answers; at most {MOST_ANSWERS} at once", key)
        return body, prompts

    async def _body(self, request: Request, most: int) -> bytes:
        large = RequestError(f"the body has more than {most} bytes", status=413)
        if int(request.headers.get("content-length", 0)) > most:
            raise large
        raw = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    raw += chunk
                    if len(raw) > most:
                        raise large
        except TimeoutError:
            raise RequestError(f"the body was not here within {BODY_SECONDS:g} seconds", status=408) from None
        return bytes(raw)

    def _described(self) -> dict[str, Any]:
        backend = self.served.backend
        return {
            "id": backend.listed,
            "object": "model",
            "created": 0,
            "owned_by": "holdfast",
            "max_model_len": backend.prompts.context,
            "root": backend.name,
            "stage": backend.stage,
        }


def _check_model(name: str, backend: Backend) -> None:
    if name not in (backend.listed, backend.name):
        raise RequestError(
            f"The model `{name[:200]}` does not exist here; {backend.listed} does",
            "model",
            code="model_not_found",
            status=404,
        )


class _Reply(Response):
    """A response that is generated while its client is there, and its time lasts."""

    def __init__(self, service: Service, served: Served, exchange: Exchange, deadline: float):
        self._service, self._served, self._exchange, self._deadline = service, served, exchange, deadline
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._exchange.start()
        send_all = self._stream if self._exchange.request.stream else self._whole
        work = asyncio.ensure_future(send_all(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            left = self._deadline + READ_SECONDS - asyncio.get_running_loop().time()
            await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            self._exchange.cancel()
            self._service.leave(self._served)
            for task in (work, gone):
                task.cancel()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                answer = await self._exchange.whole()
        except TimeoutError:
            raise self._late() from None
        await JSONResponse(answer)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with asyncio.timeout_at(self._deadline):
                async for data in self._exchange.events():
                    await _event(send, data)
        except TimeoutError:
            await _event(send, json.dumps(self._late().body))
        except RequestError as error:
            await _event(send, json.dumps(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _late(self) -> RequestError:
        seconds = self._service.limits.seconds
        return RequestError(
            f"the request took longer than {seconds:g} seconds", status=504, code="timeout", kind="timeout_error"
        )


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"retry-after": "1"} if error.status == 429 else {}
    return JSONResponse(error.body, error.status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RequestError(said).body, error.status_code, error.headers)


async def _left(*_: object) -> Response:
    return Response(status_code=499)


async def _failed(*_: object) -> Response:
    return JSONResponse(RequestError("the server failed", kind="server_error").body, 500)
