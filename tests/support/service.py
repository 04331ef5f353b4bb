"""The OpenAI interface to a tiny model, without a run, and requests to it in this process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2
import torch
import uvicorn

from holdfast.deploy.openai.application import Service
from holdfast.deploy.openai.exchange import Backend
from holdfast.deploy.openai.limits import Limits
from holdfast.deploy.openai.prompts import Prompts
from holdfast.models.batcher import Batcher
from support.tiny import VOCABULARY, tiny_model, tiny_tokenizer

CONTEXT = 128


def service(
    limits: Limits | None = None, *, tokenizer: Any = None, model: Any = None, context: int = CONTEXT, batch: int = 8
) -> Service:
    """A server whose answers differ from prompt to prompt."""
    limits = limits or Limits()
    tokenizer = tokenizer or tiny_tokenizer()
    model = model or tiny_model(initializer_range=0.5, max_position_embeddings=context)
    prompts = Prompts(tokenizer, "auto", context=context, vocabulary=VOCABULARY, max_tokens=limits.max_tokens)
    batcher = Batcher(
        model.eval(), batch_size=batch, batch_tokens=batch * context, concurrency=limits.concurrency, pad_token_id=0
    )
    return Service(Backend("tiny", 1, "tiny", prompts, batcher, ThreadPoolExecutor(1)), limits)


def ask(app: Service, route: str, body: Any, **options: Any) -> httpx2.Response:
    """One request; ``body`` is bytes, or what becomes JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    [reply] = ask_all(app, [(route, content)], **options)
    return reply


def ask_all(app: Service, requests: list[tuple[str, bytes]], **options: Any) -> list[httpx2.Response]:
    """Several requests at once."""

    async def asked() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app.application())
        async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
            each = [client.post(f"/v1/{route}", content=content, **options) for route, content in requests]
            return await asyncio.gather(*each)

    return asyncio.run(asked())


def complete(app: Service, prompt: Any, **options: Any) -> list[dict[str, Any]]:
    """The choices of a completion, whole or streamed."""
    reply = ask(app, "completions", {"prompt": prompt} | options)
    assert reply.status_code == 200, reply.text
    if not options.get("stream"):
        return reply.json()["choices"]
    choices: dict[int, dict[str, Any]] = {}
    for event in events(reply.text):
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "parts": [], "logprobs": [], "finish_reason": None})
            choice["text"] += part["text"]
            choice["parts"].append(part["text"])
            choice["logprobs"].append(part["logprobs"])
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    *found, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in found]


def with_bad_weights() -> Any:
    """A model whose logits are not numbers."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return model


@contextmanager
def on_a_socket(app: Service) -> Iterator[str]:
    """The base of its URL."""
    config = uvicorn.Config(app.application(), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
