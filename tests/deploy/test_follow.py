"""A server that follows a run answers with the stage that it holds, and drops no request when that changes."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn

import holdfast
from holdfast.deploy import follow
from holdfast.deploy.follow import Follower, held_stage
from holdfast.deploy.openai.application import Service
from holdfast.deploy.openai.limits import Limits
from holdfast.deploy.serve import backend, serve
from holdfast.errors import ConfigError
from holdfast.records.directory import open_directory
from holdfast.runner.reload import find_stage
from holdfast.system.files import read_jsonl, write_json
from holdfast.system.machine import free_port
from holdfast.system.progress import Progress
from support import forked
from support.tiny import tiny_config, tiny_model

QUIET = Progress(quiet=True)
LIMITS = Limits()


class FollowingServer:
    """A server of a run, in threads of this process."""

    def __init__(self, path: Path):
        self.path, self.said = path, list[str]()
        self.models = weakref.WeakSet[Any]()
        stored = find_stage(path, held_stage(path))
        self.service = Service(self._load(stored), LIMITS)
        self.follower = Follower(self.service, stored, lambda n: find_stage(path, n), self._load, self.said.append)
        self.port = free_port()
        config = uvicorn.Config(self.service.application(), port=self.port, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.follower.start()
        wait(lambda: self.server.started)

    def _load(self, stored: Any) -> Any:
        gc.collect()
        assert len(self.models) <= 1, "a third model would be in memory"
        made = backend(stored, LIMITS, follow=True)
        self.models.add(made.batcher._model)
        return made

    def get(self, path: str) -> dict[str, Any]:
        return httpx2.get(f"http://127.0.0.1:{self.port}{path}").json()

    def serves(self, stage: int) -> bool:
        return self.get("/health")["stage"] == stage

    def stop(self) -> None:
        self.follower.stop()
        self.server.should_exit = True
        self.thread.join()


class Client:
    """Asks for the answers to a run's test rows without pause, in some threads."""

    def __init__(self, server: FollowingServer, prompts: list[str], threads: int = 2):
        self.server, self.prompts = server, prompts
        self.answers: list[tuple[str, str, str]] = []
        self.refused: list[str] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(threads)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=60) as client:
            while not self.ended.is_set():
                prompt = self.prompts[number % len(self.prompts)]
                number += 1
                body = {"model": "run", "messages": [{"role": "user", "content": prompt}], "max_tokens": 3}
                try:
                    answer = client.post("/v1/chat/completions", json=body)
                except Exception as error:
                    self.refused.append(repr(error))
                    continue
                if answer.status_code != 200:
                    self.refused.append(answer.text)
                    continue
                said = answer.json()
                self.answers.append((said["model"], prompt, said["choices"][0]["message"]["content"]))

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def wait(until: Callable[[], bool]) -> None:
    """Fail where it takes minutes, which it never does on the slowest machine."""
    begun = time.monotonic()
    while not until():
        assert time.monotonic() < begun + 300, "what is waited for does not happen"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "EVERY", 0.05)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages answer differently."""
    folder = tmp_path_factory.mktemp("followed")
    values = tiny_config(folder)
    tiny_model(initializer_range=0.5).save_pretrained(folder / "model")
    values["training"] |= {"epochs": 2}
    write_json(folder / "config.json", values)
    return folder / "config.json"


@pytest.fixture(scope="module")
def asked(config: Path) -> tuple[FollowingServer, Client]:
    """A client asked from before the first stage until after the last one, through three rollbacks and a rebuilding.

    ``before`` is the run as it was before it was made again without its last task.
    """
    path = config.parent / "run"
    code = f"import holdfast, json; holdfast.run(json.load(open({str(config)!r})))"
    training = forked.start("-c", code)
    wait((path / "matrix.json").exists)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "EVERY", 0.05)
        server = FollowingServer(path)
        rows = read_jsonl(path / "stages" / "00-start" / "responses" / "red.jsonl")
        client = Client(server, [row["prompt"] for row in rows])
        assert training.wait() == 0, training.communicate()
        wait(lambda: server.serves(3))
        for stage in (1, 0, 3, 2):
            if stage == 2:
                shutil.copytree(path, path.with_name("before"))
                holdfast.rebuild(path, without="blue", progress=QUIET)
            else:
                holdfast.rollback(path, to=stage, progress=QUIET)
            wait(lambda stage=stage: server.serves(stage))
            count = len(client.answers)
            wait(lambda count=count: len(client.answers) > count + 3)
        client.stop()
        server.stop()
    return server, client


def test_no_request_is_dropped_and_each_is_answered_by_one_stage(asked: tuple[FollowingServer, Client], config: Path):
    """Also while models are exchanged: the answer is the one that the run measured with the stage that it names."""
    server, client = asked
    assert not client.refused
    by_stage = {model for model, _, _ in client.answers}
    assert {"run/00-start", "run/01-red", "run/03-blue"} <= by_stage
    for model, prompt, text in client.answers:
        stage = config.parent / "before" / "stages" / model.partition("/")[2]
        rows = read_jsonl(stage / "responses" / "red.jsonl")
        assert text.strip() in [row["response"] for row in rows if row["prompt"] == prompt], (model, prompt)
    said = {model: {text for of, _, text in client.answers if of == model} for model in by_stage}
    assert said["run/00-start"] != said["run/01-red"] and said["run/03-blue"] != said["run/01-red"]
    served = ["run/03-blue", "run/01-red", "run/00-start", "run/03-blue", "run/02-green"]
    assert server.said[-4:] == [f"serves {new} now, not {old}" for old, new in pairwise(served)]


@pytest.fixture
def server(asked: Any, config: Path, tmp_path: Path) -> Iterator[FollowingServer]:
    """A server of a copy of the finished run, which holds stage 3."""
    for name, copy in (("before", "run"), ("model", "model")):
        shutil.copytree(config.parent / name, tmp_path / copy)
    server = FollowingServer(tmp_path / "run")
    yield server
    server.stop()


def test_health_and_models_say_which_stage_is_served(server: FollowingServer):
    assert server.get("/health") == {
        "status": "ok",
        "model": "run/03-blue",
        "stage": 3,
        "requests": 0,
        "sequences": 0,
    }
    (model,) = server.get("/v1/models")["data"]
    assert (model["id"], model["root"], model["stage"]) == ("run", "run/03-blue", 3)
    assert server.get("/v1/models/run/03-blue") == server.get("/v1/models/run") == model
    assert "does not exist here; run does" in json.dumps(server.get("/v1/models/run/01-red"))


def test_a_stage_that_was_made_again_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, new = (SimpleNamespace(number=1, weights=w, run=SimpleNamespace(path=tmp_path)) for w in ("old", "new"))
    backend, said = SimpleNamespace(name="run/01-red", threads=SimpleNamespace(shutdown=lambda wait: None)), list[str]()
    served = SimpleNamespace(backend=backend, inside=0)
    service: Any = SimpleNamespace(served=served, exchange=lambda backend: served)
    follower = Follower(service, old, lambda number: new, lambda stored: backend, said.append)
    monkeypatch.setattr("holdfast.deploy.follow.held_stage", lambda run: 1)
    monkeypatch.setattr("holdfast.deploy.follow._state", lambda run: "seen")
    follower._look()
    assert said == ["serves run/01-red as it was made again"]


@pytest.mark.slow
def test_a_third_model_waits_for_the_last_request_of_the_first(server: FollowingServer):
    held = server.service._enter()
    holdfast.rollback(server.path, to=1, progress=QUIET)
    wait(lambda: server.serves(1))
    holdfast.rollback(server.path, to=2, progress=QUIET)
    time.sleep(0.5)
    assert server.serves(1) and len(server.models) == 2
    server.service.leave(held)
    del held
    wait(lambda: server.serves(2))


def test_a_stage_that_cannot_be_loaded_leaves_the_old_one_in_service(server: FollowingServer, caplog: Any):
    holdfast.rollback(server.path, to=1, progress=QUIET)
    wait(lambda: server.serves(1))
    weights = server.path / "stages" / "02-green" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with open_directory(server.path) as directory:
        directory.go_back(3, 2)
    with caplog.at_level(logging.ERROR, "holdfast"):
        wait(lambda: bool(caplog.records))
        assert "stage 2 cannot be loaded" in caplog.text and "run/01-red stays in service" in caplog.text
    assert server.serves(1)
    holdfast.rollback(server.path, to=3, progress=QUIET)
    wait(lambda: server.serves(3))


def test_what_does_not_go_together_is_refused(asked: Any, config: Path):
    for options, message in (({"stage": 1}, "--stage, which never changes"), ({"engine": "vllm"}, "--engine vllm")):
        with pytest.raises(ConfigError, match=message):
            serve(config.parent / "run", follow=True, progress=QUIET, **options)
