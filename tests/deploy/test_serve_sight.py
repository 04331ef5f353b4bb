"""A model that sees, behind OpenAI's interface: pictures in messages, refusals, and evaluation through an endpoint."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra [serve]")

from holdfast.data.formats import to_examples
from holdfast.deploy.openai.application import Service
from holdfast.deploy.openai.limits import Limits
from holdfast.deploy.serve import _tokenizer, backend
from holdfast.errors import DataError
from holdfast.models import pictures
from holdfast.models.endpoint import Endpoint
from holdfast.models.pictures import forget, is_place, known, look_at, look_once, number_of
from holdfast.runner.evaluate import evaluate
from holdfast.runner.reload import find_stage
from holdfast.runner.run import run
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.doubles import ChatServer
from support.served import Server
from support.service import ask, ask_all, events
from support.sight import seeing_config, write_pictures, write_seeing, write_seen_tasks

QUIET = Progress(quiet=True)


def write_run(folder: Path, family: str, **changes: Any) -> Path:
    """An untrained run whose responses differ from picture to picture; a row shows two of them."""
    write_seeing(folder / "model", family)
    write_seen_tasks(folder / "tasks", train=4, test=8)
    rows = read_json(folder / "tasks" / "red" / "test.json")
    rows[1] = {"images": [rows[1]["image"], rows[2]["image"]], "prompt": "is <image> or <image> red?", "answer": "r"}
    (folder / "tasks" / "red" / "test.json").write_text(json.dumps(rows))
    run(seeing_config(folder, family, method="frozen") | changes, QUIET)
    return folder / "run"


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("seen"), request.param)


@pytest.fixture(scope="module")
def app(finished: Path) -> Iterator[Service]:
    """Of a process that has read no data."""
    before = dict(pictures._KNOWN)
    pictures._KNOWN.clear()
    limits = Limits(pictures=3)
    yield Service(backend(find_stage(finished), limits), limits)
    pictures._KNOWN.update(before)


def part(file: Path, **more: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url} | more}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def question(*parts: Any, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 3} | options


def rows(finished: Path, task: str) -> tuple[Path, list[dict[str, Any]], list[str]]:
    """The folder of a task's pictures, its test rows, and the run's responses to them."""
    folder = finished.parent / "tasks" / task
    responses = [
        row["response"] for row in read_jsonl(finished / "stages" / "00-start" / "responses" / f"{task}.jsonl")
    ]
    return folder, read_json(folder / "test.json"), responses


def answer(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


def wait_until_shown_no_more(content: bytes) -> None:
    """A batch ends a moment after its answers."""
    for _ in range(1000):
        if number_of(content) in pictures._SHOWN:
            time.sleep(0.01)


def test_answers_are_those_of_the_evaluation(app: Service, finished: Path):
    folder, asked, expected = rows(finished, "green")
    assert len(set(expected)) > 1, "the tiny model says the same to every picture"
    bodies = [question(part(folder / row["image"], detail="auto"), text(row["prompt"])) for row in asked]
    replies = ask_all(app, [("chat/completions", json.dumps(body).encode()) for body in bodies])
    assert [answer(reply).strip() for reply in replies] == expected
    streamed = ask(app, "chat/completions", bodies[0] | {"stream": True, "n": 2})
    deltas: dict[int, str] = {}
    for event in events(streamed.text):
        for choice in event["choices"]:
            deltas[choice["index"]] = deltas.get(choice["index"], "") + (choice["delta"].get("content") or "")
    assert [deltas[n].strip() for n in (0, 1)] == [expected[0]] * 2


def test_several_pictures_stand_where_they_are_shown(app: Service, finished: Path):
    folder, asked, expected = rows(finished, "red")
    one, other = (part(folder / name) for name in asked[1]["images"])
    parts = [text("is "), one, text(" or "), other, text(" red?")]
    whole = ask(app, "chat/completions", question(*parts, logprobs=True, top_logprobs=1))
    assert answer(whole).strip() == expected[1]
    turned = ask(app, "chat/completions", question(text("is "), other, text(" or "), one, text(" red?"), logprobs=True))
    first, second = (reply.json()["choices"][0]["logprobs"]["content"][0]["logprob"] for reply in (whole, turned))
    assert first != second


def test_a_picture_is_known_while_it_is_shown(app: Service, finished: Path, tmp_path: Path):
    [name] = write_pictures(tmp_path, 1, seed=5)
    body = question(part(tmp_path / name), text("red?"))
    content = (tmp_path / name).read_bytes()
    answer(ask(app, "chat/completions", body))
    wait_until_shown_no_more(content)
    with pytest.raises(DataError, match="do not hold any more"):
        known(number_of(content))
    held = look_once(content, "held")
    answer(ask(app, "chat/completions", body))
    assert known(held.number) is held, "another request still shows it"
    picture = look_at(tmp_path / name)
    del held
    answer(ask(app, "chat/completions", body))
    wait_until_shown_no_more(content)
    assert known(number_of(content)).source == tmp_path / name, "the data hold it"
    forget([picture])


def test_what_cannot_be_shown_is_refused(app: Service, finished: Path, tmp_path: Path):
    [name] = write_pictures(tmp_path, 1, seed=6)
    good = part(tmp_path / name)
    Image.new("RGB", (8, 8)).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )
    Image.new("L", (9000, 8000)).save(tmp_path / "huge.png")

    def url(value: Any) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": value}}

    for parts, said in (
        ([url("https://example.com/a.png")], r"turn 1: content, part 1: 'https://example.com/a.png' is not fetched"),
        ([url(str(tmp_path / name))], "is not fetched here"),
        ([url(f"file://{tmp_path / name}")], "is not fetched here"),
        ([text("a"), url("data:image/png;base64,a-b")], "part 2: its data URL is no base64"),
        ([url("data:image/png;base64,AAAA")], "is no picture that Pillow can read"),
        ([part(tmp_path / "moving.gif")], "is animated"),
        ([part(tmp_path / "huge.png")], "9000 x 8000 pixels"),
        ([good] * 4, "part 4: is picture 4 of the request; at most 3"),
        ([part(tmp_path / name, detail="low")], "detail: the model's own processor"),
        ([{"type": "image_url", "image_url": "data:"}], "must be {type: image_url"),
        ([good | {"path": "a"}], "path: is not used"),
        ([{"type": "image", "path": str(tmp_path / name)}], "is of type 'image'"),
        ([good, text("a \ufdd2")], "for which the row has no picture"),
    ):
        reply = ask(app, "chat/completions", question(*parts, text("?")))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages"), said
        assert said in reply.json()["error"]["message"], reply.text
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [good]},
        {"role": "user", "content": "b"},
    ]
    reply = ask(app, "chat/completions", {"messages": messages})
    assert (reply.status_code, "an answer shows no picture" in reply.text) == (400, True), reply.text


def test_completions_are_text_alone(app: Service):
    reply = ask(app, "completions", {"prompt": "red: ab?", "max_tokens": 3, "logprobs": 1, "echo": True})
    assert reply.status_code == 200, reply.text
    token = app.served.backend.prompts._sight.image_token_id
    for prompt in (f"a{app.served.backend.prompts._sight.image_token}", [3, token]):
        reply = ask(app, "completions", {"prompt": prompt})
        assert reply.status_code == 400 and "stands for a part of a picture" in reply.json()["error"]["message"]


def test_a_larger_body_is_taken_than_of_text(app: Service):
    body = json.dumps(question(text("?"), text(" " * (5 << 20))))
    assert ask(app, "chat/completions", body.encode()).status_code == 400
    body = json.dumps(question(text("?"), text(" " * (33 << 20))))
    assert ask(app, "chat/completions", body.encode()).status_code == 413


def test_vllm_is_told_where_pictures_stand(finished: Path):
    """The chat template that stands for the plain one gives the run's own tokens, by the model's processor."""
    stored = find_stage(finished)
    plain = stored.config.model_copy(update={"data": stored.config.data.model_copy(update={"template": "plain"})})
    tokenizer, encoder = _tokenizer(replace(stored, config=plain))
    folder, [_, row, *_], _ = rows(finished, "red")
    [example] = to_examples([row], "prompt_answer", file=folder / "test.json")
    one, other = ({"type": "image"} for _ in row["images"])
    messages = [{"role": "user", "content": [text("is "), one, text(" or "), other, text(" red?")]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoder.sight is not None
    images = [Image.open(folder / name).convert("RGB") for name in row["images"]]
    ids = encoder.sight.processor(text=[rendered], images=[images], add_special_tokens=False)["input_ids"][0]
    own = [encoder.sight.image_token_id if is_place(token) else token for token in encoder.prompt(example, 4)]
    assert list(ids) == own


def test_an_evaluation_through_an_endpoint_shows_the_pictures(finished: Path, tmp_path: Path):
    server = Server(finished)
    try:
        evaluated = evaluate(finished, endpoint=Endpoint(server.url, ""), output=tmp_path / "again", progress=QUIET)
    finally:
        server.stop()
    assert evaluated.changed == {"red": 0, "green": 0}
    for file in find_stage(finished).folder.glob("responses/*.jsonl"):
        assert file.read_text() == (tmp_path / "again" / "responses" / file.name).read_text()


def test_an_endpoint_gets_the_files_as_data_urls(finished: Path, tmp_path: Path):
    folder, asked, _ = rows(finished, "green")
    stub = ChatServer(lambda body, _: "g")
    try:
        evaluate(finished, endpoint=Endpoint(stub.url, "m"), output=tmp_path / "out", progress=QUIET)
    finally:
        stub.close()
    contents = [body["messages"][-1]["content"] for body in stub.requests]
    for row in asked:
        assert [part(folder / row["image"]), text(row["prompt"])] in contents
    two = rows(finished, "red")[1][1]["images"]
    one, other = (part(finished.parent / "tasks" / "red" / name) for name in two)
    assert [text("is "), one, text(" or "), other, text(" red?")] in contents
