"""Rows with pictures in all usual forms, and what is said of those that cannot be used."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from holdfast.api.task import PICTURE, Example
from holdfast.config.stream import DataConfig, StreamConfig, TaskConfig
from holdfast.data.formats import detect, to_examples
from holdfast.data.load import load_stream
from holdfast.data.source import Source, load_task
from holdfast.errors import ConfigError, DataError
from holdfast.models.pictures import number_of
from support.sight import write_pictures

ANSWER = {"role": "assistant", "content": "a cat"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(write_pictures(tmp_path, 2)):
        (tmp_path / name).rename(tmp_path / f"{number}.png")
    return tmp_path


def read(row: dict[str, Any], folder: Path, **options: Any) -> Example:
    file = folder / "train.json"
    [example] = to_examples([row], detect([row], file)[0], file=file, **options)
    return example


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


FORMS: dict[str, dict[str, Any]] = {
    "a column without a mark": {"image": "0.png", "prompt": "what?", "answer": "a cat"},
    "a column with a mark": {"image": "0.png", "prompt": "<image>what?", "answer": "a cat"},
    "a list": {"images": ["0.png"], "prompt": "what?", "answer": "a cat"},
    "llava": {
        "id": "7",
        "image": "0.png",
        "conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cat"}],
    },
    "a part with a path": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": "what?"}]},
            ANSWER,
        ]
    },
    "a part of a column": {
        "images": [{"path": "0.png", "bytes": None}],
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, ANSWER],
    },
    "alpaca": {"image": "0.png", "instruction": "what?", "output": "a cat"},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_row_are_one_example(form, folder):
    example = read(FORMS[form], folder)
    assert [picture.source for picture in example.pictures] == [folder / "0.png"]
    assert example.turns[0].content == f"{PICTURE}what?" and example.answer == "a cat"
    assert example.question == "<image>what?"


def test_bytes_and_data_urls_are_pictures(folder):
    content = (folder / "0.png").read_bytes()
    for source in (content, {"bytes": content, "path": None}, data_url(folder / "0.png")):
        row = {"image": source, "prompt": "what?", "answer": "a cat"}
        assert [picture.number for picture in read(row, folder).pictures] == [number_of(content)]
    url = data_url(folder / "1.png")
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": url.replace("image/png", "image")},
        {"type": "image", "image": f"file://{folder / '1.png'}"},
        {"type": "image", "base64": url.partition(",")[2]},
    ):
        asked = {"role": "user", "content": [part, {"type": "text", "text": "what?"}]}
        [picture] = read({"messages": [asked, ANSWER]}, folder).pictures
        assert picture.size == Image.open(folder / "1.png").size


def test_a_part_without_a_picture_is_told(folder):
    part = {"type": "image", "source": {"type": "base64", "data": "QUJD"}}
    with pytest.raises(DataError, match=r"part 1: has no picture, neither of its own \(path, .*\) nor of the row"):
        read({"messages": [{"role": "user", "content": [part]}, ANSWER]}, folder)


def test_pictures_stand_in_the_order_of_their_marks(folder):
    row = {
        "images": ["0.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "<image> one"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "two <image>"},
            {"from": "gpt", "value": "b"},
        ],
    }
    turns = read(row, folder).turns
    assert [[picture.source.name for picture in turn.pictures] for turn in turns] == [["0.png"], [], ["1.png"], []]
    assert turns[2].content == f"two {PICTURE}" and turns[2].cut == (0, len(turns[2].content))


def test_paths_start_from_the_task_s_folder_of_pictures(folder):
    (folder / "pictures").mkdir()
    (folder / "0.png").rename(folder / "pictures" / "0.png")
    example = read(FORMS["a list"], folder, images=folder / "pictures")
    assert [picture.source for picture in example.pictures] == [folder / "pictures" / "0.png"]


def with_a_frame_without_size() -> bytes:
    """A TIFF file whose second directory has one entry, which is no width or height."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "TIFF")
    content = bytearray(file.getvalue())
    first = int.from_bytes(content[4:8], "little")
    after = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    content[after : after + 4] = len(content).to_bytes(4, "little")
    return bytes(content) + b"\x01\x00" + b"\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00\x00\x00" + bytes(4)


def damaged(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:-60])
    (folder / "text.png").write_text("no picture")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    frames[0].save(folder / "two.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    Image.new("I;16", (8, 8)).save(folder / "deep.png")
    (folder / "half.tiff").write_bytes(with_a_frame_without_size())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "gone.png"}, r"image: 'gone.png' cannot be read: No such file .*\(looked for in "),
        ({"image": "cut.png"}, "image: 'cut.png' is broken"),
        ({"image": "text.png"}, "image: 'text.png' is no picture that Pillow can read"),
        ({"image": "two.gif"}, r"image: 'two.gif' is animated \(2 frames\); save the frame that is meant"),
        ({"image": "huge.png"}, "image: 'huge.png' has 9000 x 9000 pixels, more than 64 millions"),
        ({"image": "deep.png"}, "image: 'deep.png' has more than 8 bits a colour"),
        ({"image": "half.tiff"}, "image: 'half.tiff' is broken"),
        ({"image": "https://host/0.png"}, "image: 'https://host/0.png' is an address of the web; give a file"),
        ({"image": "a\0.png"}, "image: .* cannot be read: embedded null"),
        (
            {"image": "QUJD" * 300},
            "image: 'QUJDQUJDQUJDQUJDQUJD'... has 1200 characters and is no path; write .* as data:",
        ),
        ({"image": {"bytes": "?"}}, "image: its content is no base64"),
        ({"image": {"bytes": b"no picture"}}, "image: 'picture of 10 bytes' is no picture"),
        ({"image": 7}, "image: must be a path or the bytes of a picture, not a number"),
        ({"image": "data:image/png;base64,?"}, "image: its content is no base64"),
        (
            {"images": ["0.png", "1.png"], "prompt": "<image>?"},
            "<image>: stands in 1 places, and the row has 2",
        ),
        ({"image": "0.png", "prompt": "<image><image>?"}, "prompt: shows one picture more than the 1 of the row"),
        ({"image": "0.png", "answer": "see <image>"}, "turn 2: an answer shows no picture"),
        ({"video": "0.mp4"}, "video: text and pictures alone can be trained"),
    ],
)
def test_a_row_that_cannot_be_used_is_told_with_file_row_and_reason(row, said, folder):
    damaged(folder)
    with pytest.raises(DataError, match=rf"train\.json: row 1: {said}"):
        read({"prompt": "what?", "answer": "a cat"} | row, folder)


def test_a_turned_photograph_has_the_size_that_it_is_shown_in(tmp_path):
    image = Image.fromarray(np.arange(8 * 20 * 3, dtype=np.uint8).reshape(8, 20, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    [picture] = read({"image": "turned.jpg", "prompt": "what?", "answer": "a"}, tmp_path).pictures
    assert picture.size == picture.pixels().size == (8, 20)


def test_a_dataset_and_a_parquet_file_with_pictures_are_read(folder):
    rows = {"image": [str(folder / f"{n}.png") for n in (0, 1, 0)], "prompt": ["x?", "y?", "z?"], "answer": [*"abc"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    for split in ("train", "test"):
        table.to_parquet(folder / "parquet" / f"{split}.parquet")
    wanted = [number_of((folder / f"{n}.png").read_bytes()) for n in (0, 1, 0)]
    for source in (
        Source("seen", TaskConfig(name="seen", path=str(folder / "parquet")), folder=folder / "parquet"),
        Source("seen", TaskConfig(name="seen", dataset="x"), dataset=(str(folder / "saved"), None)),
    ):
        task = load_task(source, DataConfig())
        assert [picture.number for example in task.train for picture in example.pictures] == wanted
        names = [picture.name for example in task.train for picture in example.pictures]
        assert [Path(name).name for name in names] == ["0.png", "1.png", "0.png"]


def test_a_saved_dataset_as_a_path_is_told_to_be_a_dataset(folder):
    rows = {"image": [str(folder / "0.png")], "prompt": ["x?"], "answer": ["a"]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved")
    with pytest.raises(ConfigError, match=r"path: '.*saved' is a dataset that save_to_disk wrote; write dataset: "):
        load_task(Source("seen", TaskConfig(name="seen", path="x"), folder=folder / "saved"), DataConfig())


def test_a_picture_without_a_name_is_called_by_its_size(folder):
    content = (folder / "0.png").read_bytes()
    table = datasets.Dataset.from_dict({"image": [{"bytes": content}], "prompt": ["x?"], "answer": ["a"]})
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder / "saved")
    source = Source("seen", TaskConfig(name="seen", dataset="x"), dataset=(str(folder / "saved"), None))
    task = load_task(source, DataConfig())
    assert [picture.name for picture in task.train[0].pictures] == [f"picture of {len(content)} bytes"]


def test_rows_that_differ_in_their_picture_alone_are_no_duplicates(folder):
    (folder / "task").mkdir()
    rows = [{"image": f"../{n}.png", "prompt": "what?", "answer": "a"} for n in (0, 1)]
    (folder / "task" / "train.json").write_text(json.dumps(rows[:1]))
    (folder / "task" / "test.json").write_text(json.dumps(rows[1:]))
    [task] = load_stream(StreamConfig(path=str(folder), order=["task"]), DataConfig()).tasks
    assert task.counts.test_rows_in_train == 0


SIZED = """
import json, resource, sys
from holdfast.data.formats import to_examples
rows = [{"image": f"{i}.bmp", "prompt": f"what {i}?", "answer": "a"} for i in range(int(sys.argv[2]))]
examples = to_examples(rows, "prompt_answer", file=sys.argv[1])
assert len(examples) == len(rows) == len({example.pictures[0].number for example in examples})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_thousand_rows_with_pictures_do_not_stay_in_memory(tmp_path):
    for number in range(10_000):
        file = io.BytesIO()
        Image.new("RGB", (96, 96), (number % 256, number // 256, 7)).save(file, "BMP")  # 27 KiB
        (tmp_path / f"{number}.bmp").write_bytes(file.getvalue())
    sizes = [
        int(
            subprocess.run(
                [sys.executable, "-c", SIZED, str(tmp_path / "t.json"), count], capture_output=True, check=True
            ).stdout
        )
        for count in ("100", "10000")
    ]
    assert sizes[1] - sizes[0] < 40_000  # KiB; the files have 270,000
