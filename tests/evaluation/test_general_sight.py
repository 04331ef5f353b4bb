"""Questions with choices about pictures: read from files, and answered as plain transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from holdfast.api.task import PICTURE, Stream
from holdfast.config.evaluation import GeneralConfig
from holdfast.config.model import ModelConfig
from holdfast.data.encode import Encoder
from holdfast.data.encode_apart import encoder_of
from holdfast.errors import ConfigError, DataError
from holdfast.evaluation.abilities import load_general
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.general import encode_choices, general_statistics
from holdfast.models.pictures import pictures_in
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sight import callable_with_pictures, load_sight
from holdfast.models.weights import load_language_model
from support.command import holdfast
from support.sight import seeing_config, seeing_model, write_pictures, write_seeing
from support.tiny import tiny_tokenizer

CHOICES = ["abc", "xyz", "q12"]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load(path: Path, **options: Any) -> Any:
    [measure] = load_general([GeneralConfig(name="g", path=str(path), kind="choices", **options)], Stream("s", []))
    return measure


def row(question: str, answer: Any = 0, **pictures: Any) -> dict[str, Any]:
    return {"question": question, "choices": CHOICES, "answer": answer} | pictures


class Seeing:
    """A tiny model, as holdfast loads it and plain, and pictures."""

    def __init__(self, folder: Path, family: str):
        self.folder = folder
        config = ModelConfig(name=str(write_seeing(folder / "model", family)))
        tokenizer, model_config = load_tokenizer(config), load_model_config(config)
        sight = load_sight(config, model_config, tokenizer)
        self.encoder: Any = encoder_of(model_config, tokenizer, sight, max_length=400)
        model = callable_with_pictures(load_language_model(folder / "model").eval(), sight)
        self.evaluation = ModelEvaluation(model, self.encoder, batch_size=4)
        self.plain, self.processor = seeing_model(family)
        self.names = write_pictures(folder, 6)

    @torch.no_grad()
    def logs(self, parts: list[Any], answer: str) -> float:
        """The log-probability of an answer to a question of texts and pictures, by plain transformers."""
        content = [{"type": "image"} if part in self.names else {"type": "text", "text": part} for part in parts]
        before = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        images = [Image.open(self.folder / part).convert("RGB") for part in parts if part in self.names]
        pictures = {"images": [images]} if images else {}
        inputs = self.processor(text=[before + answer], return_tensors="pt", add_special_tokens=False, **pictures)
        ids = inputs["input_ids"][0]
        logs = self.plain(**inputs).logits[0].log_softmax(-1)
        return sum(float(logs[k - 1, ids[k]]) for k in range(len(ids) - len(answer), len(ids)))


@pytest.fixture
def small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizers have no large ones."""
    monkeypatch.setattr("holdfast.data.choices.LETTERS", "abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp("seeing"), request.param)


def test_the_likeliest_choice_is_that_of_a_plain_loop(seeing: Seeing) -> None:
    one, *_ = names = seeing.names
    asked = [[name, "which?"] for name in names] + [["is ", one, " as ", names[1], "?"], ["no picture"]]
    rows = [row("which?", image=name) for name in names]
    rows += [row("is <image> as <image>?", images=names[:2]), row("no picture")]
    found = [[seeing.logs(parts, choice) for choice in CHOICES] for parts in asked]
    likeliest = [values.index(max(values)) for values in found]
    assert len(set(likeliest)) > 1
    for answers in (likeliest, ["ABC"[at] for at in likeliest], [CHOICES[at] for at in likeliest]):
        questions = [one | {"answer": answer} for one, answer in zip(rows, answers, strict=True)]
        measure = load(write(seeing.folder / "g.jsonl", questions))
        assert general_statistics(seeing.evaluation, [measure])["g"].tolist() == [[1, 1]] * 8
    turned = [one | {"answer": (at + 1) % 3} for one, at in zip(rows, likeliest, strict=True)]
    measure = load(write(seeing.folder / "g.jsonl", turned))
    assert general_statistics(seeing.evaluation, [measure])["g"][:, 0].sum() == 0


def test_letters_are_asked_after_demonstrations_with_pictures(seeing: Seeing, small_letters: None) -> None:
    names = seeing.names
    dev = [row("first?", 1, image=names[0]) | {"subject": "x"}, row("second?", 2, images=names[1:3])]
    file = write(seeing.folder / "dev.jsonl", dev)
    options = {"by": "letter", "shots": 1, "demonstrations": str(file)}
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip("abc", CHOICES, strict=True))
    heading = "The following are multiple choice questions (with answers) about x.\n\n"
    tested = []
    for name in names[3:5]:
        parts = [heading, names[0], f"first?\n{lines}\nAnswer: b\n\n", name, f"which?\n{lines}\nAnswer:"]
        found = [seeing.logs(parts, letter) for letter in "abc"]
        tested.append(row("which?", found.index(max(found)), image=name) | {"subject": "x"})
    measure = load(write(seeing.folder / "g.jsonl", tested), **options)
    assert general_statistics(seeing.evaluation, [measure])["g"].tolist() == [[1, 1]] * 2
    assert [[picture.name for picture in shown] for shown in measure.pictures] == [
        [names[0], name] for name in names[3:5]
    ]
    assert measure.shown[0][1].startswith(f"{PICTURE}first?") and measure.questions[0][0].startswith(f"{PICTURE}which?")


def test_demonstrations_that_do_not_fit_are_left_out_with_their_pictures(seeing: Seeing, small_letters: None) -> None:
    names = seeing.names
    tested = write(seeing.folder / "g.jsonl", [row("which?", image=names[4])])
    dev = write(seeing.folder / "dev.jsonl", [row("first?", 1, image=names[0]), row("next?", 1, image=names[1])])
    measure = load(tested, by="letter", shots=2, demonstrations=str(dev))
    config = load_model_config(ModelConfig(name=str(seeing.folder / "model")))
    [[whole], *_] = encode_choices(seeing.encoder, measure)
    for cut, shown in ((0, [0, 1, 4]), (20, [0, 4]), (70, [4])):
        most = len(whole["input_ids"]) + 8 - cut
        encoder = encoder_of(config, seeing.encoder.tokenizer, seeing.encoder.sight, max_length=most)
        [[first], *_] = encode_choices(encoder, measure)
        assert [names.index(picture.name) for picture in pictures_in(first["input_ids"])] == shown


def test_a_folder_of_pictures_may_be_named(seeing: Seeing, tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", [row("which?", image=seeing.names[0])])
    measure = load(file, images=str(seeing.folder))
    assert [picture.name for [picture] in measure.pictures] == [seeing.names[0]]
    with pytest.raises(DataError, match=rf"g.jsonl.*row 1.*image: '{seeing.names[0]}' cannot be read"):
        load(file)
    with pytest.raises(ConfigError, match=r"general: g: images: .*nowhere"):
        load(file, images=str(tmp_path / "nowhere"))
    with pytest.raises(ValidationError, match="images: is for kind choices, not perplexity"):
        GeneralConfig(name="g", path=str(file), images=str(tmp_path))


def test_marks_must_stand_in_the_question(seeing: Seeing) -> None:
    name = seeing.names[0]
    for wrong, said in (
        (row("<image> or <image>?", image=name), "shows one picture more"),
        (row("<image>?", images=[name, name]), "stands in 1 places, and the row has 2"),
        (row("which?", image=name) | {"choices": ["<image>", "b"]}, "<image>: must stand in the question"),
    ):
        with pytest.raises(DataError, match=f"row 1.*{said}"):
            load(write(seeing.folder / "g.jsonl", [wrong]))
    for kind, key in (("refusals", "prompt"), ("perplexity", "text")):
        file = write(seeing.folder / "g.jsonl", [{key: "a", "image": name}])
        with pytest.raises(DataError, match=f"row 1.*image: shows a picture, and kind {kind} asks by text"):
            load_general([GeneralConfig(name="g", path=str(file), kind=kind)], Stream("s", []))


def test_a_model_that_reads_text_alone_says_so(seeing: Seeing) -> None:
    measure = load(write(seeing.folder / "g.jsonl", [row("which?", image=seeing.names[0])]))
    evaluation = ModelEvaluation(seeing.plain, Encoder(tiny_tokenizer(), max_length=64), batch_size=4)
    with pytest.raises(DataError, match="shows a picture, and the model reads text alone"):
        general_statistics(evaluation, [measure])


def test_a_run_measures_and_check_tells_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = write_pictures(tmp_path, 4)
    file = write(tmp_path / "g.jsonl", [row("which?", k % 3, image=name) for k, name in enumerate(names)])
    config = seeing_config(tmp_path, method="frozen")
    config["evaluation"] |= {"general": [{"name": "quiz", "path": str(file), "kind": "choices"}]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert holdfast("check", tmp_path / "config.yaml") == 0
    assert "quiz: 4 questions by acc, chance 0.500, 4 pictures" in capsys.readouterr().out
    assert holdfast("check", tmp_path / "config.yaml", "--general") == 0
    assert "at chance, so a fall cannot show" in capsys.readouterr().out
    assert holdfast("run", tmp_path / "config.yaml") == 0
    matrix = json.loads((tmp_path / "run" / "matrix.json").read_text())
    assert matrix["general"]["quiz"][0] in (0, 0.25, 0.5, 0.75, 1) and matrix["chance"]["quiz"]["at_chance"]
    write_pictures(tmp_path, 4, seed=1)
    for number, name in enumerate(names):
        (tmp_path / f"1-{number}.png").rename(tmp_path / name)
    assert holdfast("run", tmp_path / "config.yaml") == 2
    assert "general ability quiz" in capsys.readouterr().err
