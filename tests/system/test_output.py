"""What a user names is written whole, or to a device, and never over what a run has recorded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from holdfast.errors import ConfigError
from holdfast.system.output import write_output


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "stages" / "01-red").mkdir(parents=True)
    for name in ("run.json", "events.jsonl", "report.html", "stages/01-red/stage.json", "stages/01-red/weights.pt"):
        (tmp_path / "run" / name).write_text("recorded")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name", ["run.json", "events.jsonl", "manifest.jsonl", "stages/01-red/stage.json", "stages/01-red/weights.pt"]
)
def test_a_run_keeps_what_it_recorded(run: Path, name: str) -> None:
    before = sorted((path, path.read_text()) for path in run.rglob("*") if path.is_file())
    with pytest.raises(ConfigError, match=r"would be a file of the run in .*run; name one that ends with \.html"):
        write_output(run / name, "page")
    assert before == sorted((path, path.read_text()) for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["run/report.html", "run/new/gate.xml", "run/summary", "elsewhere/page.json"])
def test_a_page_may_lie_anywhere_else(run: Path, name: str) -> None:
    write_output(run.parent / name, "page")
    assert (run.parent / name).read_text() == "page"


def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "page.html").symlink_to("there.html")
    write_output(tmp_path / "page.html", "page")
    assert (tmp_path / "page.html").is_symlink() and (tmp_path / "there.html").read_text() == "page"


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(tmp_path / "pipe", "page")
    assert os.read(reader, 99) == b"page" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    write_output(Path("/dev/null"), "page")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(("name", "said"), [(".", "is a folder"), ("file/page.html", "cannot be written: ")])
def test_what_cannot_be_a_file_is_told(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=said):
        write_output(tmp_path / name, "page")
