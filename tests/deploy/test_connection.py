"""A connection that brings no request does not keep its place; one that is answered slowly does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
import uvicorn
from uvicorn.server import ServerState

from holdfast.deploy.openai import connection


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.05)


async def slow(scope, receive, send):
    await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(slow, http=connection.Connection, lifespan="off", log_level="critical")
    state, loop = ServerState(), asyncio.get_running_loop()
    made = lambda: connection.Connection(config=config, server_state=state, app_state={})  # noqa: E731
    server = await loop.create_server(made, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        async with asyncio.timeout(60):
            yield reader, writer
    finally:
        writer.close()
        server.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHo"])
def test_a_connection_without_a_request_is_closed(sent):
    async def wait() -> bytes:
        async with connected() as (reader, writer):
            writer.write(sent)
            return await reader.read()

    assert asyncio.run(wait()) == b""


def test_a_request_is_answered_however_long_it_takes():
    async def ask() -> bytes:
        async with connected() as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return await reader.read()

    assert asyncio.run(ask()).endswith(b"ok")
