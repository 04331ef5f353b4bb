"""A stage that is served gives the answers that it gave in process, also where its server dies in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.deploy import serve as serving
from holdfast.deploy.openai.limits import Limits
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.models.endpoint import Endpoint, only_model
from holdfast.runner.evaluate import evaluate
from holdfast.runner.reload import find_stage
from holdfast.runner.run import run
from holdfast.system.files import read_jsonl
from holdfast.system.machine import free_port
from holdfast.system.progress import Progress
from support.doubles import ChatServer
from support.served import Server
from support.tiny import tiny_config, tiny_model, tiny_tokenizer, write_tasks

QUIET = Progress(quiet=True)
CHAT = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}{{ 'a:' if add_generation_prompt }}"


def write_run(folder: Path, **changes: Any) -> Path:
    """An untrained run whose responses differ from prompt to prompt."""
    tiny_model(initializer_range=0.5).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_tasks(folder / "tasks", train=4, test=40)
    config = tiny_config(folder, method="frozen") | changes
    config["evaluation"] = {"max_new_tokens": 12, "bootstrap": 0}
    run(config, QUIET)
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("served"))


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Any:
    """Evaluates the run through an endpoint, and compares every response with the run's."""

    def asked(endpoint: Endpoint, path: Path = finished, output: Path = tmp_path / "again") -> None:
        evaluated = evaluate(path, endpoint=endpoint, output=output, progress=QUIET)
        assert evaluated.changed == {"red": 0, "green": 0, "blue": 0}
        for file in find_stage(path).folder.glob("responses/*.jsonl"):
            assert file.read_text() == (output / "responses" / file.name).read_text()
        assert not (output / "answers.jsonl").exists()

    return asked


@pytest.fixture
def server(finished: Path) -> Iterator[Server]:
    server = Server(finished)
    yield server
    server.stop()


def test_answers_are_those_in_process(again: Any, server: Server, finished: Path):
    responses = [
        json.loads(line)["response"] for file in finished.glob("stages/*/responses/**/*.jsonl") for line in file.open()
    ]
    assert len(set(responses)) > 20, "the tiny model says the same to everything"
    endpoint = Endpoint(server.url, "", concurrency=32)
    again(endpoint)
    assert endpoint.model == "run/00-start"
    assert set(server.answered.values()) == {1}
    server.stop()
    again(Endpoint(server.url, "", retries=0))  # it is finished, so nobody is asked


def die_after(server: Server, answers: int) -> threading.Thread:
    """Stops the server once it has given so many answers."""

    def die() -> None:
        while len(server.answered) < answers:
            time.sleep(0.002)
        server.stop()

    thread = threading.Thread(target=die)
    thread.start()
    return thread


def test_an_evaluation_waits_for_a_server_that_is_restarted(again: Any, server: Server):
    """32 requests are under way when it dies."""

    def restart() -> None:
        die_after(server, 40).join()
        server.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    again(Endpoint(server.url, "run/00-start", concurrency=32, retries=20))
    restarting.join()
    assert sum(server.answered.values()) - len(server.answered) <= 32, "more was asked again than was under way"


def test_the_same_call_goes_on_where_a_server_died(again: Any, server: Server, tmp_path: Path):
    dying = die_after(server, 40)
    endpoint = Endpoint(server.url, "run/00-start", concurrency=32, retries=0)
    with pytest.raises(ConfigError, match="1 attempts were made"):
        again(endpoint)
    dying.join()
    kept = (tmp_path / "again" / "answers.jsonl").read_text().splitlines()
    assert len(kept) >= 8
    server.answered = Counter()
    server.start()
    again(endpoint)
    assert set(server.answered.values()) == {1}
    everything = {row["prompt"] for file in (tmp_path / "again" / "responses").iterdir() for row in read_jsonl(file)}
    assert len(kept) + len(server.answered) == len(everything)
    again(endpoint)
    assert sum(server.answered.values()) + len(kept) == len(everything), "a finished evaluation was asked again"


def test_a_server_without_completions_is_asked_by_chat(finished: Path, tmp_path: Path):
    stub = ChatServer(lambda body, _: f" {body['messages'][-1]['content'][0]} ")
    try:
        evaluated = evaluate(finished, endpoint=Endpoint(stub.url, "m"), output=tmp_path / "chat", progress=QUIET)
    finally:
        stub.close()
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in stub.requests} == {(0, 12, "m")}
    assert evaluated.scores["red"][0] == pytest.approx(0.85, abs=0.15)
    assert evaluated.scores["red"][1] == 0.0
    assert len(stub.requests) == len({str(body["messages"]) for body in stub.requests})


def test_an_endpoint_that_does_not_say_what_it_serves_needs_a_model():
    stub = ChatServer(lambda *_: "")
    try:
        with pytest.raises(ConfigError, match=r"--model: endpoint .* does not say what it serves"):
            only_model(Endpoint(stub.url, ""))
    finally:
        stub.close()


def test_another_evaluation_in_the_same_folder_is_refused(finished: Path, tmp_path: Path):
    first = evaluate(finished, output=tmp_path / "own", progress=QUIET)
    assert first.changed == {"red": 0, "green": 0, "blue": 0}
    with pytest.raises(RunDirectoryError, match=r"another evaluation \(endpoint: None -> .*give another --output"):
        evaluate(finished, endpoint=Endpoint("http://127.0.0.1:1/v1", "m"), output=tmp_path / "own", progress=QUIET)
    with pytest.raises(RunDirectoryError, match=r"holds other files .*give another --output"):
        evaluate(finished, output=tmp_path, progress=QUIET)
    with pytest.raises(ConfigError, match=r"--stage: 3 is no complete stage of .*; complete, with 0 .*: 0"):
        find_stage(finished, 3)


def test_a_chat_template_and_cut_prompts_reach_the_server_as_in_process(tmp_path: Path, again: Any):
    """Prompts are cut in their middle; the template says its begin token itself."""
    tiny_model(initializer_range=0.5).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks", train=4, test=10)
    config = tiny_config(tmp_path, method="frozen", data={"max_length": 20})
    config["evaluation"] = {"max_new_tokens": 9, "bootstrap": 0}
    run(config, QUIET)
    server = Server(tmp_path / "run")
    try:
        again(Endpoint(server.url, "run/00-start", concurrency=4), tmp_path / "run", tmp_path / "again")
        chat = [{"role": "user", "content": "red: ab?"}]
        reply = httpx2.post(f"{server.url}/chat/completions", json={"messages": chat, "max_tokens": 9}).json()
        text = "<s>u:red: ab?\na:"
        same = httpx2.post(f"{server.url}/completions", json={"prompt": text, "max_tokens": 9}).json()
        assert reply["choices"][0]["message"]["content"] == same["choices"][0]["text"] != ""
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuner", "method"), [("lora", "icl"), ("moe_lora", "replay"), ("prompt_pool", "l2p"), ("adalora", "sequential")]
)
def test_every_tuner_is_served(tuner: str, method: str, tmp_path: Path, again: Any):
    """Also such as no folder of weights can be made of; demonstrations are part of what is asked."""
    tiny_model(initializer_range=0.5).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks", train=16, test=16)
    config = tiny_config(tmp_path, tuner=tuner, method=method)
    config["training"] |= {"max_steps": 1}
    config["evaluation"] = {"max_new_tokens": 10, "bootstrap": 0}
    run(config, QUIET)
    server = Server(tmp_path / "run")
    try:
        again(Endpoint(server.url, "", concurrency=8), tmp_path / "run", tmp_path / "again")
    finally:
        server.stop()


def test_chat_with_a_plain_run_is_what_it_was_trained_on(finished: Path, server: Server):
    turns = [("user", "red: ab?"), ("assistant", "r"), ("user", "red: cd?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    reply = httpx2.post(f"{server.url}/chat/completions", json={"messages": chat, "max_tokens": 9}).json()
    text = "red: ab? r</s>\nred: cd?"
    same = httpx2.post(f"{server.url}/completions", json={"prompt": text, "max_tokens": 9}).json()
    assert reply["choices"][0]["message"]["content"] == same["choices"][0]["text"].removeprefix(" ") != ""


def test_a_taken_port_and_an_unknown_engine_are_refused(finished: Path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match=r"--port: .* is taken by another program"),
    ):
        serving.serve(finished, port=taken.getsockname()[1], progress=QUIET)
    with pytest.raises(ConfigError, match=r"--engine: 'sglang' must be transformers or vllm"):
        serving.serve(finished, engine="sglang", progress=QUIET)
    for host in ("", " "):
        with pytest.raises(ConfigError, match=r"--host: is empty, which would be every address"):
            serving.serve(finished, host=host, progress=QUIET)
    for host in ("no such host", "a" * 300, "127.0.0.1\0", "::bad"):
        with pytest.raises(ConfigError, match=r"--host, --port: .* cannot be used"):
            serving.serve(finished, host=host, progress=QUIET)
    with pytest.raises(ConfigError, match=r"--engine: vllm has limits of its own"):
        serving.serve(finished, engine="vllm", limits=Limits(), progress=QUIET)


@pytest.mark.slow
def test_vllm_is_given_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """vLLM itself is not needed: its program is replaced by one that is never run."""
    config = tiny_config(
        tmp_path, tuner={"name": "lora", "r": 2}, stream={"path": str(tmp_path / "tasks"), "order": ["red"]}
    )
    config["training"] |= {"epochs": 1}
    run(config, QUIET)
    became: list[list[str]] = []
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("os.execv", lambda program, arguments: became.append([program, *arguments]))
    serving.serve(tmp_path / "run", engine="vllm", port=9, progress=QUIET)
    folder = tmp_path / "run" / "served" / "01-red"
    expected = f"/bin/vllm /bin/vllm serve {folder} --served-model-name run/01-red --host 127.0.0.1 --port 9"
    assert became == [expected.split()]
    assert (folder / "model.safetensors").exists()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        tokenize=False,
    )
    assert rendered == "a b</s>\nc"


@pytest.mark.slow
def test_the_command_goes_on_after_its_server_was_killed(finished: Path, tmp_path: Path):
    """`holdfast serve` dies by SIGKILL under 32 requests; it is started again, and so is `holdfast evaluate`."""
    port = free_port()
    output = tmp_path / "again"
    own = [sys.executable, "-m", "holdfast"]

    def start() -> subprocess.Popen[str]:
        command = [*own, "serve", str(finished), "--port", str(port)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert any("run/00-start at http" in line for line in process.stderr)
        return process

    def ask() -> subprocess.Popen[str]:
        url = f"http://127.0.0.1:{port}/v1"
        command = [*own, "evaluate", str(finished), "--endpoint", url, "--concurrency", "32"]
        command += ["--retries", "0", "-o", str(output)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    server, client = start(), ask()
    while not (output / "answers.jsonl").exists():
        time.sleep(0.001)
    os.kill(server.pid, signal.SIGKILL)
    said, _ = client.communicate()
    assert client.returncode == 2 and "1 attempts were made" in said and "Traceback" not in said
    assert server.wait() == -signal.SIGKILL
    before = (output / "answers.jsonl").read_text()
    assert before and not (output / "evaluation.json").exists()
    server, client = start(), ask()
    try:
        said, _ = client.communicate()
        assert client.returncode == 0, said
        for file in (finished / "stages").glob("00-*/responses/*.jsonl"):
            assert file.read_text() == (output / "responses" / file.name).read_text()
    finally:
        server.terminate()
        assert server.wait() in (0, -signal.SIGTERM)


def test_the_command_shows_scores_beside_those_of_the_run(finished: Path, tmp_path: Path):
    shown = CliRunner().invoke(app, ["evaluate", str(finished), "-o", str(tmp_path / "own")])
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.output.splitlines() if line.strip().startswith(("red", "green", "blue"))]
    assert rows == [[task, "accuracy", "0.000", "0.000", "0"] for task in ("red", "green", "blue")]
