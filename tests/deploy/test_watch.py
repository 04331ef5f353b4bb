"""`holdfast watch`: the live page of a run, its server, and what it costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPResponse
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from filelock import FileLock

from holdfast.deploy.watch import Watched, serving
from holdfast.records import pulse
from holdfast.records.pulse import Pulse, sampled_events
from holdfast.system.files import LOCK, append_jsonl, read_json, write_json, write_jsonl
from support.browser import ARGUMENTS, DRAWN, OVERFLOW
from support.command import holdfast
from support.synthetic_runs import TASKS, make_run
from support.tiny import tiny_config

STARTED = "2026-01-01T10:00:00+00:00"


def event(stage: int, step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"stage": stage, "task": TASKS[stage - 1], "step": step, "loss": loss, "terms": {"task": loss}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose second stage trains: 50 of 200 steps are done, the last one 100 seconds after its start."""
    made = make_run(tmp_path / "run", finished=False)
    record = read_json(made / "run.json")
    begun = {"config": record["config"], "fingerprint": "0", "versions": {}, "started": STARTED}
    stages = [begun | {"stage": 1, "task": TASKS[0], "finished": STARTED}]
    stages.append(begun | {"stage": 2, "task": TASKS[1], "finished": None})
    write_json(made / "run.json", record | {"stages": stages, "steps": [200, 200, 200, 100]})
    write_jsonl(made / "events.jsonl", [*(event(1, s) for s in (100, 200)), *(event(2, s) for s in (25, 50))])
    log_at(made, 100)
    for folder in made.glob("stages/*"):
        write_json(folder / "evaluation.json", {"general": {}, "seconds": 7.0})
    return made


def log_at(run: Path, seconds: float) -> None:
    """Let the last step be logged so long after the stage began."""
    at = datetime.fromisoformat(STARTED).timestamp() + seconds
    os.utime(run / "events.jsonl", (at, at))


@pytest.fixture
def held(run: Path) -> Iterator[Path]:
    """The same, with a process that holds it."""
    with FileLock(run / LOCK):
        yield run


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Watched(run).state().body)
    return found


def test_the_time_left_follows_from_the_pace_and_the_steps_to_come(held: Path):
    reader = Pulse(held)
    beat = reader.read()
    assert (beat.stage, beat.step, beat.pace) == (2, 50, 2.0)
    assert beat.left == (300.0, 2.0 * (150 + 200 + 100) + 3 * 7.0)
    append_jsonl(held / "events.jsonl", event(2, 60))
    log_at(held, 200)
    assert reader.read().pace == 10.0, "the pace that was seen counts more than that since the start"
    shown = state(held)["html"]
    assert "Stage 2 of 4" in shown and "of 200" in shown and "left of this stage" in shown
    record = read_json(held / "run.json")
    del record["steps"]
    write_json(held / "run.json", record)
    assert reader.read().left == (None, None), "a run before 0.2 does not say how many there are"
    assert "left of this stage" not in state(held)["html"]


def test_a_name_is_shown_and_never_obeyed(held: Path):
    record = read_json(held / "run.json")
    record["stages"][1] |= {"stage": 4, "task": TASKS[3]}
    write_json(held / "run.json", record)
    shown = state(held)["html"]
    assert "It trains on &lt;b&gt;2025&lt;/b&gt; &amp; later." in shown and "<b>2025" not in shown


@pytest.mark.skipif(not pulse.LOCKS.exists(), reason="this system does not say who holds a file")
def test_a_run_that_nobody_is_at_work_on_was_stopped(run: Path):
    with FileLock(run / LOCK):
        assert Pulse(run).read().at_work
        assert state(run)["title"] == "Stage 2 of 4: run"
    assert state(run)["title"] == "Stopped: run"
    gate = {"stage": 1, "task": TASKS[0], "passed": False, "action": "stop", "current": 1, "checks": []}
    write_json(run / "run.json", read_json(run / "run.json") | {"gate": [gate]})
    assert state(run)["title"] == "Stopped by its gate: run"


def test_a_run_is_shown_before_its_first_score_and_after_its_end(held: Path, tmp_path: Path):
    assert state(tmp_path / "nowhere")["title"].startswith("Waiting")
    (held / "matrix.json").unlink()
    (held / "events.jsonl").unlink()
    record = read_json(held / "run.json")
    write_json(held / "run.json", record | {"stages": []})
    assert state(held)["title"] == "Before training: run"
    done = make_run(tmp_path / "done")
    (done / "report.html").write_text("the page")
    found = state(done)
    assert found["title"] == "Finished: done" and 'href="report.html"' in found["html"]


def test_where_nobody_can_tell_a_page_says_how_long_nothing_came(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pulse, "LOCKS", run / "no such file")
    assert Pulse(run).read().at_work is None
    for file in run.glob("*.json"):
        shutil.copystat(run / "events.jsonl", file)
    assert state(run)["title"].startswith("No news")


def test_an_unchanged_run_is_not_read_again(held: Path):
    watched = Watched(held)
    with mock.patch.object(Pulse, "read", autospec=True, side_effect=Pulse.read) as read:
        tags = [watched.state().tag for _ in range(3)]
        assert read.call_count == 1 and len(set(tags)) == 1
        append_jsonl(held / "events.jsonl", event(2, 75))
        assert watched.state().tag != tags[0] and read.call_count == 2


def test_what_is_read_of_a_long_file_does_not_grow_with_it(tmp_path: Path):
    def parsed(count: int) -> tuple[int, list[int]]:
        write_jsonl(tmp_path / "events.jsonl", [event(1, step) for step in range(1, count + 1)])
        with mock.patch.object(pulse, "_event", side_effect=pulse._event) as parse:
            found = sampled_events(tmp_path / "events.jsonl", whole=20_000, lines=50)
        return parse.call_count, [line["step"] for line in found]

    short, long = parsed(1000), parsed(8000)
    assert short[0] == pytest.approx(long[0], abs=3) and long[0] < 120
    assert long[1] == sorted(set(long[1])) and long[1][-1] == 8000
    assert max(later - earlier for earlier, later in pairwise(long[1])) <= 1.1 * 8000 / 50, "evenly"


def test_lines_that_are_no_whole_event_are_left_out(tmp_path: Path):
    lines = [event(1, 10), event(1, 20), {"stage": 1}, {"stage": True, "step": 3}, event(1, 10, 5.0), [1], "x"]
    lines += [event(1, 30) | {"loss": "NaN"}, event(1, 40) | {"terms": []}, event(2, 1) | {"loss": None}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"stage": 2, "st'
    (tmp_path / "events.jsonl").write_bytes(text.encode() + b"\xff")
    found = [(line["stage"], line["step"], line["loss"]) for line in sampled_events(tmp_path / "events.jsonl")]
    assert found == [(1, 10, 5.0), (1, 20, 1.0), (2, 1, None)]


def test_a_damaged_file_is_told_and_the_page_stays(held: Path):
    watched = Watched(held)
    before = json.loads(watched.state().body)
    whole = (held / "matrix.json").read_text()
    (held / "matrix.json").write_text(whole[:50])
    found = json.loads(watched.state().body)
    assert "could not be read this time" in found["html"] and found["figures"] == before["figures"]
    (held / "matrix.json").write_text(whole)
    assert "could not be read" not in json.loads(watched.state().body)["html"]


def test_a_damaged_evaluation_costs_the_time_left_alone(held: Path):
    [*_, file] = sorted(held.glob("stages/*/evaluation.json"))
    file.write_text('{"general": {')
    assert Pulse(held).read()._evaluation == 0
    assert json.loads(Watched(held).state().body)["html"]


def ask(address: str, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, bytes]:
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    connection = HTTPConnection(host, int(port), timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_server_gives_the_page_and_its_state_and_nothing_else(held: Path):
    with serving(Watched(held), 0) as address:
        page, content = ask(address, "/")
        text = content.decode()
        assert page.status == 200 and "connect-src 'self'" in text and "Stage 2 of 4" in text
        assert page.headers["X-Frame-Options"] == "DENY" and page.headers["Cache-Control"] == "no-store"
        first, content = ask(address, "/state")
        assert first.status == 200 and json.loads(content)["title"] == "Stage 2 of 4: run"
        again, content = ask(address, "/state", If_None_Match=first.headers["ETag"])
        assert again.status == 304 and content == b""
        head, content = ask(address, "/state", "HEAD")
        assert head.status == 200 and content == b""
        for path in ("/run.json", "/../run.json", "/%2e%2e/run.json", "//etc/passwd", "/state/", "/report.html"):
            assert ask(address, path)[0].status == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(address, "/state", method)[0].status == 501


def test_the_server_answers_to_its_own_address_alone(held: Path):
    """A page of another site that a name server leads here (DNS rebinding) sends the name of that site."""
    with serving(Watched(held), 0) as address:
        port = address.rpartition(":")[2].rstrip("/")
        for name in (f"localhost:{port}", "localhost:9000", "127.0.0.1:9000", "[::1]:9000", "localhost"):  # forwarded
            assert ask(address, "/state", Host=name)[0].status == 200
        others = (f"holdfast.example:{port}", f"127.0.0.1.example:{port}", "localhost:x", "localhost:9000@example", "")
        for name in others:
            assert ask(address, "/state", Host=name)[0].status == 421


def test_what_cannot_be_watched_is_told(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    assert holdfast("watch", tmp_path) == 2 and "no run.json" in capsys.readouterr().err
    with serving(Watched(run), 0) as address:
        port = address.rpartition(":")[2].rstrip("/")
        assert holdfast("watch", run, "--port", port, "--no-browser") == 2
    assert f"--port: {port} is taken by another program" in capsys.readouterr().err
    record = read_json(run / "run.json")
    del record["tasks"]
    write_json(run / "run.json", record)
    assert holdfast("watch", run, "--no-browser") == 2 and "of the laboratory" in capsys.readouterr().err


def test_a_port_of_the_administrator_is_told(run: Path, capsys: pytest.CaptureFixture[str]):
    with mock.patch("socketserver.TCPServer.server_bind", side_effect=PermissionError(errno.EACCES, "denied")):
        assert holdfast("watch", run, "--port", 80, "--no-browser") == 2
    assert "--port: 80 is below 1024, where only an administrator may listen; give a higher port, such as 8080" in (
        capsys.readouterr().err
    )


def test_control_c_ends_it_cleanly(run: Path):
    command = [sys.executable, "-m", "holdfast", "watch", str(run), "--no-browser"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = process.stderr.readline().split()[1]
    assert ask(address, "/state")[0].status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
def test_a_run_with_an_open_page_ends_as_one_without(tmp_path: Path):
    """Bit for bit: weights and scores."""
    results = []
    for name, flags in (("plain", []), ("shown", ["--open", "--no-browser"])):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / name)))
        command = [sys.executable, "-m", "holdfast", "run", str(tmp_path / f"{name}.yaml"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ("http://127.0.0.1:" in done.stderr) == (name == "shown")
        root = tmp_path / name / "run"
        weights = [file.read_bytes() for file in sorted(root.glob("stages/*/*/*.safetensors"))]
        results.append((read_json(root / "matrix.json"), weights))
    assert results[0] == results[1] and results[0][1]


@pytest.mark.browser
def test_a_person_sees_the_page_move_on(held: Path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    complaints: list[str] = []
    with playwright.sync_playwright() as started, serving(Watched(held), 0) as address:
        browser = started.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 390, "height": 900})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(address) or complaints.append(request.url))
        page.goto(address)
        page.wait_for_function(DRAWN)
        assert "Step 50 of 200" in page.locator("[data-section=state]").inner_text()
        points = "() => document.getElementById('plot-1').data.map(line => line.x.filter(x => x !== null).at(-1))"
        assert page.evaluate(points) == [250]
        append_jsonl(held / "events.jsonl", event(2, 75))
        page.get_by_text("Step 75 of 200").wait_for()
        page.wait_for_function(f"() => ({points})()[0] === 275")
        record = read_json(held / "run.json")
        write_json(held / "run.json", record | {"finished": datetime.now(UTC).isoformat()})
        page.get_by_role("heading", name="Finished").wait_for()
        assert page.evaluate(OVERFLOW) == 0 and page.title() == "Finished: run"
        assert page.evaluate("() => window.attacked") is None
        browser.close()
    assert complaints == []
