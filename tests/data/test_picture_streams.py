"""CoIN, UCIT and MLLM-DCL: their order, files of their layouts, and what is said where one is missing."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from holdfast.api.task import Stream, Task
from holdfast.config.stream import DataConfig, StreamConfig
from holdfast.data.benchmark import benchmark_source
from holdfast.data.load import load_stream
from holdfast.data.streams.definition import find
from holdfast.errors import ConfigError, DataError
from holdfast.scoring.score import response_records, score_records
from holdfast.system.files import read_json
from support.paths import GOLDEN

Rows = list[dict[str, Any]]

COIN = ["ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "Grounding", "VQAv2", "OCRVQA"]
UCIT = ["ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k"]
DCL = ["RS", "Med", "AD", "Sci", "Fin"]
BOX = "[0.10, 0.20, 0.50, 0.90]"


def png(path: Path) -> None:
    """A grey picture of 4 x 4 pixels, which differs from that of every other path."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    shades = zlib.crc32(str(path).encode()).to_bytes(4, "big")
    pixels = zlib.compress(b"".join(b"\0" + shades for _ in range(4)))
    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def save(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def train_rows(name: str, answer: str, images: Path) -> Rows:
    rows = []
    for n in range(3):
        image = f"./{name}/train/{n}.png"
        png(images / image)
        rows.append(
            {
                "id": n,
                "image": image,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{name} train {n}?\nAnswer shortly."},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    return rows


def test_rows(name: str, images: Path, **more: Any) -> Rows:
    rows = []
    for n in range(2):
        image = f"./{name}/test/{n}.png"
        png(images / image)
        rows.append({"question_id": f"q{n}", "image": image, "text": f"{name} test {n}?\nAnswer shortly."} | more)
    return rows


test_rows.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoIN's layout: instructions of both types, and pictures in cl_dataset."""
    root = tmp_path_factory.mktemp("coin")
    pictures = root / "cl_dataset"
    for name in COIN:
        answer = {"ScienceQA": "B", "Grounding": BOX}.get(name, "dog")
        test = "val" if name in ("TextVQA", "VizWiz", "VQAv2") else "test"
        right = {"answer_bbox": BOX, "size": [4, 4]} if name == "Grounding" else {"answer": answer}
        save(root / "Instructions_Original" / name / "train.json", train_rows(name, answer, pictures))
        save(root / "Instructions_Original" / name / f"{test}.json", test_rows(name, pictures, **right))
        save(root / "Instruction_Type2" / name / "train.json", [])
    save(root / "Instructions_Original" / "VQAv2" / "test.json", [{"question_id": 1, "image": "x.png", "text": "?"}])
    questions = json.loads((root / "Instructions_Original" / "ScienceQA" / "test.json").read_text())
    questions[1]["text"] = "<image>\nScienceQA test 1?\nAnswer shortly."
    del questions[0]["image"]  # some questions have no picture
    save(root / "Instructions_Original" / "ScienceQA" / "test.json", questions)
    people = [{"question_id": f"q{n}", "answers": ["dog"] * 3 + ["cat"] * 7} for n in range(2)]
    save(pictures / "TextVQA" / "TextVQA_0.5.1_val.json", {"data": people})
    return root


@pytest.fixture(scope="module")
def ucit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UCIT's layout as HiDe-LLaVA has it: instructions and datasets side by side."""
    root = tmp_path_factory.mktemp("ucit")
    pictures, instructions = root / "datasets", root / "instructions"
    files = {"CLEVR": ("train_4w", "test_3000"), "ArxivQA": ("train_4w", "test_3000")}
    for name in ["ImageNet-R", "ArxivQA", "VizWiz-caption", "IconQA", "CLEVR", "Flickr30k-cap"]:
        train, test = files.get(name, ("train", "test_3000"))
        save(instructions / name / f"{train}.json", train_rows(name, "a dog", pictures))
        save(instructions / name / f"{test}.json", test_rows(name, pictures, answer="a dog"))
    for name in ["VizWiz-caption", "Flickr30k-cap"]:
        coco = {
            "images": [{"id": n + 1, "file_name": f"{n}.png"} for n in range(2)],
            "annotations": [
                {"image_id": n + 1, "caption": caption} for n in range(2) for caption in (f"a dog {n}", "a red dog")
            ],
        }
        save(instructions / name / "val_coco_type_3000.json", coco)
    return root


@pytest.fixture(scope="module")
def dcl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLLM-DCL's layout: each domain has its pictures in its own folder."""
    root = tmp_path_factory.mktemp("Domain_data")
    for name in DCL:
        answer = "Yes" if name == "Fin" else "dog"
        save(root / name / "train.json", train_rows("images", answer, root / name))
        save(root / name / "test.json", test_rows("images", root / name, answer=answer))
    rows = json.loads((root / "Fin" / "test.json").read_text())
    save(root / "Fin" / "test.json", [rows[0], rows[1] | {"answer": "C"}])
    return root


def load(name: str, path: Path, **more: Any) -> Stream:
    values = {"name": name, "path": str(path)} | more
    return load_stream(StreamConfig.model_validate(values), DataConfig())


def tasks(stream: Stream) -> dict[str, Task]:
    return {task.name: task for task in stream.tasks}


def asked(task: Task) -> list[str]:
    return [example.question for example in task.test]


# --- the definitions ---


@pytest.mark.parametrize(("stream", "names"), [("coin", COIN), ("ucit", UCIT), ("mllm_dcl", DCL)])
def test_the_order_is_that_of_the_source(stream, names):
    assert [task.name for task in find(stream).tasks] == names


def test_the_folder_of_pictures_is_the_first_that_exists(coin: Path, ucit: Path, dcl: Path, tmp_path: Path):
    def images(name: str, path: Path, **more: Any) -> set[str | None]:
        config = StreamConfig.model_validate({"name": name, "path": str(path)} | more)
        return {source.options.images for source in benchmark_source(config).tasks}

    assert images("coin", coin) == {str(coin / "cl_dataset")}
    assert images("coin", coin / "Instructions_Original") == {str(coin / "Instructions_Original")}
    assert images("coin", coin, images=str(tmp_path)) == {str(tmp_path)}
    assert images("ucit", ucit) == {str(ucit / "datasets")}
    assert images("mllm_dcl", dcl) == {None}  # that of each row's file
    with pytest.raises(ConfigError, match=r"stream\.images: there is no folder 'nowhere'"):
        images("coin", coin, images="nowhere")


def test_a_folder_of_tasks_has_a_folder_of_pictures_too(tmp_path: Path):
    rows = train_rows("GQA", "dog", tmp_path / "pictures")
    for split, part in (("train", rows[:2]), ("test", rows[2:])):
        save(tmp_path / "tasks" / "a" / f"{split}.json", part)
    values = {"path": str(tmp_path / "tasks"), "images": str(tmp_path / "pictures")}
    [task] = load_stream(StreamConfig.model_validate(values), DataConfig()).tasks
    [picture] = task.test[0].pictures
    assert picture.source == tmp_path / "pictures" / "GQA" / "train" / "2.png"
    del values["images"]
    with pytest.raises(DataError, match=r"2\.png"):
        load_stream(StreamConfig.model_validate(values), DataConfig())


def test_streams_without_pictures_have_no_folder_of_them(tmp_path: Path):
    with pytest.raises(ValueError, match="images: belongs to a path"):
        StreamConfig.model_validate({"name": "chronicle", "images": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"stream\.images: super_ni shows no pictures; leave it out"):
        load("super_ni", tmp_path, images=str(tmp_path))


# --- CoIN ---


def test_coin_is_read_in_its_layout(coin: Path):
    stream = tasks(load("coin", coin))
    assert list(stream) == COIN
    assert [len(task.train) for task in stream.values()] == [3] * 8
    assert [len(task.test) for task in stream.values()] == [2] * 8
    assert asked(stream["GQA"]) == [f"<image>\nGQA test {n}?\nAnswer shortly." for n in range(2)]
    assert stream["GQA"].train[0].question == "<image>\nGQA train 0?\nAnswer shortly."
    assert asked(stream["ScienceQA"]) == [
        "ScienceQA test 0?\nAnswer shortly.",
        "<image>\nScienceQA test 1?\nAnswer shortly.",
    ]
    assert [example.answer for example in stream["Grounding"].test] == [BOX] * 2
    assert load("coin", coin).version == read_json(GOLDEN / "streams.json")["coin"][0]
    assert Path(stream["VQAv2"].test[0].file).name == "val.json"  # its test file has no answers
    [picture] = stream["VQAv2"].test[0].pictures
    assert picture.source == coin / "cl_dataset" / "VQAv2" / "test" / "0.png"


def test_coin_is_scored_as_its_code_does(coin: Path):
    def scores(task: Task, *responses: str) -> dict[str, list[float]]:
        records = score_records(task, response_records(task, responses))
        return {task.metric: [r["score"] for r in records]} | {
            name: [r["beside"][name] for r in records] for name in task.beside
        }

    strict, source = (tasks(load("coin", coin, scoring=scoring)) for scoring in ("strict", "source"))
    assert {name: task.metric for name, task in source.items()} == {
        "ScienceQA": "coin_choice_letter",
        "TextVQA": "textvqa_accuracy",
        "ImageNet": "coin_either_contains",
        "GQA": "gqa_exact_match",
        "VizWiz": "upper_case_match",
        "Grounding": "coin_iou_accuracy",
        "VQAv2": "upper_case_match",
        "OCRVQA": "upper_case_match",
    }
    both = scores(strict["TextVQA"], "dog", "the Cat.")
    assert both["vqa_accuracy"] == both["textvqa_accuracy"] == pytest.approx([0.9, 1])  # of ten people
    assert scores(strict["VQAv2"], "DOG", "a dog")["vqa_accuracy"] == [1, 0]  # of one answer
    assert scores(strict["Grounding"], BOX, "[0, 0, 1, 1]") == {
        "iou_accuracy": [1, 0],
        "coin_iou_accuracy": [1, 0],
        "iou": pytest.approx([1, 0.28]),
    }
    assert scores(source["ScienceQA"], "B. dogs", "I see B")["coin_choice_letter"] == [1, 0]


def test_textvqa_needs_the_answers_of_ten_people(coin: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"val\.json: TextVQA_0\.5\.1_val\.json, which has the answers of ten people"):
        load("coin", coin, order=["TextVQA"], images=str(tmp_path))
    elsewhere = load("coin", coin / "Instructions_Original", order=["TextVQA"], images=str(coin / "cl_dataset"))
    assert len(elsewhere.tasks[0].test[0].also_right) == 9
    place = {"TextVQA": str(tmp_path / "TextVQA")}
    save(tmp_path / "TextVQA" / "train.json", train_rows("TextVQA", "dog", coin / "cl_dataset"))
    rows = test_rows("TextVQA", coin / "cl_dataset", answer="dog")
    save(tmp_path / "TextVQA" / "val.json", rows)
    assert len(load("coin", coin, order=["TextVQA"], paths=place).tasks[0].test) == 2
    save(tmp_path / "TextVQA" / "val.json", [rows[0], rows[1] | {"question_id": 7}])
    with pytest.raises(DataError, match=r"val\.json: row 2 .*: question_id: '7' is not in .*TextVQA_0\.5\.1_val\.json"):
        load("coin", coin, order=["TextVQA"], paths=place)


def test_a_missing_file_is_named_with_its_places(coin: Path, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"'GQA' has no train split; looked for GQA/train.* or Instructions_Original/GQA"
    ):
        load("coin", tmp_path, order=["GQA"])
    with pytest.raises(DataError, match=r"'GQA' has no train split; looked for train\{\.json"):
        load("coin", coin, order=["GQA"], paths={"GQA": str(tmp_path)})


@pytest.mark.parametrize("key", ["text", "answer"])
def test_a_test_row_without_question_or_answer_is_named(coin: Path, tmp_path: Path, key: str):
    rows = test_rows("GQA", coin / "cl_dataset", answer="dog")
    del rows[1][key]
    save(tmp_path / "train.json", train_rows("GQA", "dog", coin / "cl_dataset"))
    save(tmp_path / "test.json", rows)
    with pytest.raises(DataError, match=r"test\.json: row 2 \(line 1\): must have text, the question, and answer or"):
        load("coin", coin, order=["GQA"], paths={"GQA": str(tmp_path)})


# --- UCIT ---


def test_ucit_is_read_in_its_layout(ucit: Path):
    stream = tasks(load("ucit", ucit))
    assert list(stream) == UCIT
    assert [(len(task.train), len(task.test)) for task in stream.values()] == [(3, 2)] * 6
    assert {name: task.metric for name, task in stream.items()} == dict.fromkeys(UCIT, "accuracy") | {
        "VizWiz": "cider",
        "Flickr30k": "cider",
    }
    assert stream["VizWiz"].beside == ["bleu", "rouge_l"]
    assert load("ucit", ucit).version == read_json(GOLDEN / "streams.json")["ucit"][0]
    records = response_records(stream["Flickr30k"], ["a dog", "a dog"])
    assert [record["answers"] for record in records] == [[f"a dog {n}", "a red dog"] for n in range(2)]
    [picture] = stream["CLEVR-Math"].test[0].pictures
    assert picture.source == ucit / "datasets" / "CLEVR" / "test" / "0.png"


def test_ucit_is_read_as_mcitlib_lays_it_out(ucit: Path, tmp_path: Path):
    for name in UCIT:
        place = {"VizWiz": "VizWiz-caption", "CLEVR-Math": "CLEVR", "Flickr30k": "Flickr30k-cap"}.get(name, name)
        for file in (ucit / "instructions" / place).iterdir():
            stem = file.name.replace("_4w", "").replace("test_3000", "test")
            save(tmp_path / "UCIT" / name / stem, json.loads(file.read_text()))
    stream = load("ucit", tmp_path, images=str(ucit / "datasets"))
    assert [task.fingerprint for task in stream.tasks] == [task.fingerprint for task in load("ucit", ucit).tasks]


def test_captions_that_are_of_other_pictures_are_refused(ucit: Path, tmp_path: Path):
    place = tmp_path / "VizWiz"
    for file in (ucit / "instructions" / "VizWiz-caption").iterdir():
        save(place / file.name, json.loads(file.read_text()))
    coco = json.loads((place / "val_coco_type_3000.json").read_text())
    stream = {"order": ["VizWiz"], "paths": {"VizWiz": str(place)}}
    save(place / "val_coco_type_3000.json", coco | {"images": [*coco["images"][:1], {"id": 2, "file_name": "7.png"}]})
    with pytest.raises(
        DataError, match=r"test_3000\.json: row 2 .*: 1\.png is not picture 2 of .*, which is of 7\.png"
    ):
        load("ucit", ucit, **stream)
    save(place / "val_coco_type_3000.json", coco | {"annotations": coco["annotations"][:2]})
    with pytest.raises(DataError, match=r"1\.png is not picture 2 of .*, which has no caption"):
        load("ucit", ucit, **stream)
    (place / "val_coco_type_3000.json").unlink()
    with pytest.raises(DataError, match=r"must be beside it once, and is there 0 times"):
        load("ucit", ucit, **stream)


# --- MLLM-DCL ---


def test_mllm_dcl_is_read_in_its_layout(dcl: Path):
    stream = tasks(load("mllm_dcl", dcl))
    assert list(stream) == DCL
    assert [(len(task.train), len(task.test)) for task in stream.values()] == [(3, 2)] * 5
    assert load("mllm_dcl", dcl).version == read_json(GOLDEN / "streams.json")["mllm_dcl"][0]
    records = response_records(stream["Sci"], ["dog", "dog"])
    assert [record["pictures"] for record in records] == [["./images/test/0.png"], ["./images/test/1.png"]]
    assert asked(stream["RS"])[0] == "<image>\nimages test 0?\nAnswer shortly."
    assert asked(stream["Fin"]) == [
        "<image>\nimages test 0?\nAnswer shortly. Only answer with yes or no directly.",
        "<image>\nimages test 1?\nAnswer shortly. Answer with the given letter directly, e.g., A, B, C, D.",
    ]
    [picture] = stream["AD"].test[0].pictures
    assert picture.source == dcl / "AD" / "images" / "test" / "0.png"
    assert list(tasks(load("mllm_dcl", dcl.parent, order=["Sci"], paths={"Sci": str(dcl / "Sci")}))) == ["Sci"]
