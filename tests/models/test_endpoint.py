"""The client of endpoints: deadlines that hold, passwords that stay out, and answers of every shape."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from holdfast.api.task import Example, Turn
from holdfast.cli import main
from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.run import load_config
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError, Interrupted
from holdfast.evaluation.served import EndpointModel
from holdfast.models.answers import AnswerCache
from holdfast.models.endpoint import Endpoint, only_model
from holdfast.system.url import hide_logins, split_login
from support.doubles import ChatServer
from support.tiny import tiny_config, tiny_tokenizer

QUESTION = [[{"role": "user", "content": "a"}]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n"


@contextmanager
def raw_server(answer: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
    """Its URL; ``answer`` is given each connection, and the request that came with it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def handle(client: socket.socket) -> None:
            request = b""
            with client:
                while b"\r\n\r\n" not in request:
                    if not (part := client.recv(65536)):
                        return
                    request += part
                head, _, body = request.partition(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head.lower())
                while length and len(body) < int(length[1]):
                    body += client.recv(65536)
                with suppress(OSError):  # the client left
                    answer(client, head + body)

        def accept() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=handle, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


def replying(body: bytes, headers: bytes = b"") -> Any:
    return raw_server(lambda client, _: client.sendall(OK % (len(body), headers) + body))


def chat_reply(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize("where", ["headers", "body"])
def test_an_answer_that_drips_meets_the_deadline(where: str):
    """A byte comes in every 0.03 seconds, for 1.2 seconds, and then a right answer."""
    stop = threading.Event()
    body = chat_reply("late")

    def drip(client: socket.socket, _: bytes) -> None:
        head = OK.partition(b"%d")
        whole = head[0] + b"%d" % (len(body) + 40) + b"\r\n"
        client.sendall(whole if where == "headers" else whole + b"\r\n")
        for _ in range(40):
            stop.wait(0.03)
            client.sendall(b"X: y\r\n" if where == "headers" else b" ")
        client.sendall((b"\r\n" + b" " * 40 if where == "headers" else b"") + body)

    with raw_server(drip) as url:
        with pytest.raises(ConfigError, match=r"no answer within 0\.2 seconds; 2 attempts were made"):
            Endpoint(url, "m", timeout=0.2, retries=1).chat(QUESTION)
        assert Endpoint(url, "m", timeout=60).chat(QUESTION) == ["late"]
        stop.set()


def test_a_caller_that_stops_does_not_wait_for_the_rest():
    held = threading.Event()

    def answer(client: socket.socket, request: bytes) -> None:
        if b"quick" not in request:
            held.wait(300)
        client.sendall(OK % (len(chat_reply("a")), b"Connection: close\r\n") + chat_reply("a"))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    turns = [[{"role": "user", "content": text}] for text in ("quick", "slow", "slow")]
    with raw_server(answer) as url, pytest.raises(KeyboardInterrupt):
        Endpoint(url, "m", concurrency=3).chat(turns, on_answer=interrupted)
    assert not held.is_set()
    held.set()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        (None, ""),
        (
            [{"type": "text", "text": "in "}, {"type": "reasoning", "text": "no"}, {"type": "text", "text": "parts"}],
            "in parts",
        ),
        ("half \ud800 a character", "half \ufffd a character"),
    ],
)
def test_texts_of_every_shape_are_read(content: Any, text: str):
    with replying(chat_reply(content), b"Content-Type: text/plain; charset=hex\r\n") as url:
        assert Endpoint(url, "m").chat(QUESTION) == [text]


@pytest.mark.parametrize(
    "body",
    [
        chat_reply(5), chat_reply({"text": "a"}), chat_reply(["a"]), chat_reply([[]]), b"", b"null", b"[]", b'"text"',
        b'{"choices": []}', b'{"choices": {}}', b"[" * 100_000, b'{"choices": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"choices": [{"message": {"content": ' + b"9" * 5000 + b"}}]}", b"\xff\xfe\x00", b"<html>\x1b[2Jno</html>",
    ],
)  # fmt: skip
def test_something_else_than_an_answer_is_named(body: bytes):
    with replying(body, b"Content-Type: text/html; charset=base64\r\n") as url:
        with pytest.raises(ConfigError, match="something else than a chat completion") as error:
            Endpoint(url, "m").chat(QUESTION)
        with pytest.raises(ConfigError, match="something else than a list of models"):
            Endpoint(url, "m").models()
    assert str(error.value).isprintable() and len(str(error.value)) < 1200


def test_answers_that_cannot_be_decoded_are_no_answers():
    refused = pytest.raises(ConfigError, match=r"no answer: .*; 1 attempts were made")
    with replying(b"no gzip", b"Content-Encoding: gzip\r\n") as url, refused:
        Endpoint(url, "m", retries=0).chat(QUESTION)


def test_a_missing_model_is_no_missing_route():
    stub = ChatServer(lambda *_: (404, '"code": "model_not_found"'))
    try:
        with pytest.raises(ConfigError, match="status 404") as error:
            Endpoint(stub.url, "m").chat(QUESTION)
        assert type(error.value) is ConfigError
    finally:
        stub.close()


def test_a_password_is_sent_and_neither_kept_nor_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    stub = ChatServer(lambda body, n: "yes" if n == 1 else (403, "no"))
    try:
        endpoint = Endpoint(stub.url.replace("://", "://me:pass%2Fword@"), "m")
        assert endpoint.chat(QUESTION) == ["yes"] and endpoint.url == stub.url
        with pytest.raises(ConfigError) as error:
            endpoint.chat(QUESTION)
    finally:
        stub.close()
    assert stub.keys == [f"Basic {base64.b64encode(b'me:pass/word').decode()}"] * 2
    assert "pass" not in str(error.value) and "me:" not in str(error.value)
    with pytest.raises(ConfigError, match="no answer") as error:
        only_model(Endpoint("http://me:secret@127.0.0.1:1/v1", "", retries=0))
    assert "secret" not in str(error.value)
    assert split_login("http://u:p?#@h/v1/") == ("http://h/v1", ("u", "p?#"))
    assert hide_logins("holdfast --endpoint 'http://me:secret@h/v1' a@b") == (
        "holdfast --endpoint 'http://USER:PASSWORD@h/v1' a@b"
    )


@pytest.mark.parametrize(
    "url",
    ["http://me:sec/ret@h/v1", "me:secret@h/v1", "http://h/v1?key=secret", "http://h/v1#secret", "http://me:secret@",
     "http://me:secret@h:port/v1", "http://me:secret@[::1/v1", "ftp://me:secret@h", "http://me:secret@h/a b", ""],
)  # fmt: skip
def test_urls_that_cannot_be_asked_are_refused_without_their_secrets(url: str):
    with pytest.raises(ConfigError, match=r"^endpoint") as error:
        Endpoint(url, "m").chat(QUESTION)
    assert "sec" not in str(error.value)
    with pytest.raises(ConfigError, match="timeout: must be more than 0"):
        Endpoint("http://h/v1", "m", timeout=float("nan"))


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch):
    for key in ("geheim-ß", "geheim\nX: y", "geheim\x00"[:6] + "\x01"):
        monkeypatch.setenv("KEY", key)
        with pytest.raises(ConfigError, match="KEY: holds characters") as error:
            Endpoint("http://h/v1", "m", key_variable="KEY")
        assert "geheim" not in str(error.value)


def test_a_judges_password_does_not_reach_run_json(tmp_path: Any):
    judge = {"url": "http://me:secret@h/v1", "model": "m"}
    with pytest.raises(ConfigError, match=r"evaluation\.judge\.url: holds a user name or a password") as error:
        load_config(tiny_config(tmp_path) | {"evaluation": {"judge": judge}})
    assert "secret" not in str(error.value)
    assert EvaluationConfig.model_validate({"judge": judge | {"url": "http://h/v1/"}}).judge


def test_the_command_to_go_on_with_shows_no_password(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def stopped() -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr("holdfast.cli.app", stopped)
    monkeypatch.setattr("sys.argv", ["holdfast", "evaluate", "run", "--endpoint", "http://me:secret@h/v1"])
    with pytest.raises(SystemExit):
        main()
    assert re.search(r"http://USER:PASSWORD@h/v1", said := capsys.readouterr().err) and "secret" not in said


def test_reasoning_is_no_part_of_a_response_through_an_endpoint():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' }}{% if m.reasoning_content %}"
        "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '\n' }}{% endfor %}"
        "{{ 'a:' if add_generation_prompt }}"
    )
    stub = ChatServer(lambda *_: "<think>well</think> red", route="completions")
    try:
        model = EndpointModel(Endpoint(stub.url, "m"))
        example = Example("file", 0, (Turn("user", "ab?"), Turn("assistant", "red")))
        encoder = Encoder(tokenizer, max_length=64)
        assert model.respond(encoder, [example], 5, None, AnswerCache()) == ["red"]
    finally:
        stub.close()
