"""learn with pictures: a run keeps its own copies, tests and rehearses them after the giver's are gone, and lets go."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.errors import UserError
from holdfast.records.kept import drop_pictures, shown_pictures
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.sight import write_pictures, write_seeing

QUIET = Progress(quiet=True)
FAST = [
    "training.max_steps=2", "evaluation.bootstrap=0", "evaluation.shift=0", "evaluation.max_new_tokens=2",
    "evaluation.general=[]", "method=replay",
]  # fmt: skip


def month(folder: Path, seed: int, count: int = 8) -> Path:
    """Rows in three forms: a path, a data URL, and parts of a message."""
    (folder / "given").mkdir(parents=True, exist_ok=True)
    names = write_pictures(folder / "given", count, seed)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        asked, answer = f"is {number}?", "ny"[number % 2]
        content = base64.b64encode((folder / "given" / name).read_bytes()).decode()
        if number % 3 == 2:
            parts = [{"type": "image", "path": name}, {"type": "text", "text": asked}]
            rows.append({"prompt": [{"role": "user", "content": parts}], "answer": answer})
        else:
            image = f"data:image/png;base64,{content}" if number % 3 else name
            rows.append({"image": image, "prompt": asked, "answer": answer})
    file = folder / "given" / f"month-{seed}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def learn(folder: Path, seed: int, **options: Any) -> Any:
    first = {} if (folder / "run").exists() else {"model": folder / "model", "overrides": FAST}
    return holdfast.learn(month(folder, seed), folder / "run", progress=QUIET, **first, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two months, the first of which its giver has deleted before the second."""
    folder = tmp_path_factory.mktemp("months")
    write_seeing(folder / "model")
    learn(folder, 1)
    shutil.rmtree(folder / "given")
    learn(folder, 2)
    shutil.rmtree(folder / "given")
    return folder


def test_later_months_rehearse_and_test_pictures_whose_givers_files_are_gone(two: Path):
    run = two / "run"
    kept = {file.name for file in (run / "pictures").iterdir()}
    assert len(kept) == 16 and shown_pictures(run) == kept
    matrix = read_json(run / "matrix.json")
    assert len(matrix["tasks"]) == 2 and all(score is not None for score in matrix["scores"][-1])
    events = read_jsonl(run / "events.jsonl")
    assert any(event["terms"].get("replay") for event in events if event["stage"] == 2)
    rows = read_jsonl(run / "data" / "01-month-1" / "train.jsonl")
    assert rows and all(
        json.dumps(row).count('"../../pictures/') == 1 and "base64" not in json.dumps(row) for row in rows
    )


def test_the_same_data_again_change_nothing_and_other_pictures_in_them_are_learned(two: Path):
    again = Path(shutil.copytree(two, two.parent / "again"))
    before = read_json(again / "run" / "learn.json")
    learn(again, 1)
    assert read_json(again / "run" / "learn.json") == before
    file = month(again, 1)
    for name, other in zip(("1-0.png", "1-3.png"), write_pictures(again / "given", 2, seed=8), strict=True):
        (again / "given" / other).rename(again / "given" / name)
    holdfast.learn(file, again / "run", progress=QUIET)
    task = read_json(again / "run" / "learn.json")["tasks"][-1]
    assert (task["name"], task["known"]) == ("month-1-2", 6)


def test_rebuilding_lets_go_of_the_pictures_of_what_goes(two: Path):
    made = Path(shutil.copytree(two / "run", two.parent / "made"))
    first = {name for file in made.glob("data/01-*/*.jsonl") for name in shown_in(file)}
    holdfast.rebuild(made, without="month-1", progress=QUIET)
    left = {file.name for file in (made / "pictures").iterdir()}
    assert len(left) == 8 and not left & first and shown_pictures(made) == left


def shown_in(file: Path) -> set[str]:
    return {part.partition('"')[0] for part in file.read_text().split("../../pictures/")[1:]}


def test_a_row_that_goes_is_known_by_its_picture(two: Path):
    """Two rows with the same words and other pictures are two rows."""
    made = Path(shutil.copytree(two / "run", two.parent / "rows"))
    file = next(made.glob("data/02-*/train.jsonl"))
    row = next(row for row in read_jsonl(file) if "image" in row)
    name = Path(row["image"]).name
    (two.parent / "gone").mkdir()
    shutil.copy(made / "pictures" / name, two.parent / "gone" / "a.png")
    write_pictures(two.parent / "gone", 1, seed=9)
    given = two.parent / "gone" / "rows.jsonl"
    given.write_text(json.dumps(row | {"image": "9-0.png"}) + "\n")
    with pytest.raises(UserError, match=r"no task of .* holds any row"):
        holdfast.rebuild(made, without_rows=given, progress=QUIET)
    given.write_text(json.dumps(row | {"image": "a.png"}) + "\n")
    holdfast.rebuild(made, without_rows=given, progress=QUIET)
    assert name not in {file.name for file in (made / "pictures").iterdir()}
    assert len(list((made / "pictures").iterdir())) == 15


@pytest.mark.parametrize("how", ["missing", "changed"])
def test_a_kept_picture_that_is_missing_or_changed_is_told_with_its_path(two: Path, how: str):
    made = Path(shutil.copytree(two / "run", two.parent / how))
    [name, other] = sorted(shown_in(next(made.glob("data/01-*/train.jsonl"))))[:2]
    (made / "pictures" / name).unlink()
    if how == "changed":
        shutil.copy(made / "pictures" / other, made / "pictures" / name)
    reason = "cannot be read" if how == "missing" else "is another picture than the one that was kept"
    with pytest.raises(UserError, match=rf"train.jsonl: row \d+.*pictures/{name}' {reason}"):
        holdfast.learn(month(two.parent / f"{how}-data", 3), made, progress=QUIET)


def test_pictures_that_no_row_shows_go(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "data" / "01-a").mkdir(parents=True)
    for name in ("0" * 15 + ".png", "1" * 15):
        (tmp_path / "pictures" / name).write_bytes(b"x")
    (tmp_path / "data" / "01-a" / "train.jsonl").write_text(json.dumps({"image": f"../../pictures/{'1' * 15}"}))
    drop_pictures(tmp_path)
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["1" * 15]
