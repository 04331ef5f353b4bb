"""Models that see, beside transformers' own processors and models: tokens, logits, losses, generation, parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from holdfast.api.rows import IGNORED
from holdfast.config.model import ModelConfig
from holdfast.config.section import Named
from holdfast.data.collate import Collator
from holdfast.data.encode import Encoder
from holdfast.data.encode_apart import encoder_of
from holdfast.data.formats import to_examples
from holdfast.errors import ConfigError, DataError
from holdfast.models.generation import generate
from holdfast.models.head import head, hidden_only
from holdfast.models.likelihood import token_losses
from holdfast.models.parts import Parts
from holdfast.models.pictures import forget, is_place, number_of, pictures_in
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sight import callable_with_pictures, load_sight
from holdfast.models.supervised import keeps_its_loss, predictions
from holdfast.models.weights import load_language_model
from holdfast.rehearsal.samples import general_rows
from holdfast.tuners import build
from support.sight import SEEING, seeing_model, write_pictures, write_seeing

ROWS: list[dict[str, Any]] = [
    {"image": "0.png", "prompt": "what is it?", "answer": "a cat"},
    {"images": ["1.png", "2.png"], "prompt": "<image> or\n<image> is x?", "answer": "the one"},
    {"prompt": "no picture", "answer": "ok"},
]
SAID: list[list[dict[str, Any]]] = [
    [{"type": "image"}, {"type": "text", "text": "what is it?"}],
    [{"type": "image"}, {"type": "text", "text": " or\n"}, {"type": "image"}, {"type": "text", "text": " is x?"}],
    [{"type": "text", "text": "no picture"}],
]
families = pytest.mark.parametrize("name", SEEING)


class Made:
    """A tiny model in both forms: as holdfast loads it, and plain beside its processor.

    Attributes:
        texts: what the processor's chat template makes of :data:`ROWS`.
        images: their pictures.
    """

    def __init__(self, folder: Path, name: str):
        self.name, self.folder = name, write_seeing(folder / name, name)
        for number, file in enumerate(write_pictures(folder, 3)):
            (folder / file).rename(folder / f"{number}.png")
        config = ModelConfig(name=str(self.folder))
        self.tokenizer = load_tokenizer(config)
        self.sight: Any = load_sight(config, load_model_config(config), self.tokenizer)
        self.model = callable_with_pictures(load_language_model(self.folder).eval(), self.sight)
        self.plain, self.processor = seeing_model(name)
        self.examples = to_examples(ROWS, "prompt_answer", file=folder / "train.json")
        files = [Image.open(folder / f"{number}.png").convert("RGB") for number in range(3)]
        self.images = [files[:1], files[1:], []]
        chats = [
            [
                {"role": "user", "content": said},
                {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
            ]
            for said, row in zip(SAID, ROWS, strict=True)
        ]
        self.texts = [self.processor.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]

    def encoder(self, **options: Any) -> Encoder:
        config = load_model_config(ModelConfig(name=str(self.folder)))
        return encoder_of(config, self.tokenizer, self.sight, **{"max_length": 256} | options)

    def rows(self) -> list[Any]:
        return [{key: row[key] for key in ("input_ids", "labels")} for row in self.encoder().encode_all(self.examples)]

    def inputs(self, number: int) -> Any:
        """The processor's own inputs of a row."""
        images = [self.images[number]] if self.images[number] else None
        return self.processor(text=[self.texts[number]], images=images, return_tensors="pt", add_special_tokens=False)

    def as_tokens(self, ids: list[int]) -> list[int]:
        return [self.sight.image_token_id if is_place(token) else token for token in ids]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each family once."""
    kept: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in kept:
            kept[name] = Made(tmp_path_factory.mktemp(name), name)
        return kept[name]

    return get


@families
def test_rows_are_the_processors(made: Any, name: str):
    model = made(name)
    for number, row in enumerate(model.rows()):
        ids = row["input_ids"]
        assert model.as_tokens(ids) == model.inputs(number)["input_ids"][0].tolist()
        shown = [
            number_of((model.folder.parent / name).read_bytes()) for name in [["0.png"], ["1.png", "2.png"], []][number]
        ]
        assert [p.number for p in pictures_in(ids)] == shown
        trained = model.tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert trained == f"{ROWS[number]['answer']}</s>"


@families
@torch.no_grad()
def test_logits_are_the_models_own(made: Any, name: str):
    model = made(name)
    batch = Collator(0)(model.rows())
    logits = model.model(**batch).logits
    for number in range(3):
        wanted = model.plain(**model.inputs(number)).logits[0]
        torch.testing.assert_close(logits[number, : len(wanted)], wanted, atol=2e-5, rtol=1e-4)


@families
def test_loss_and_gradient_are_those_of_a_plain_loop(made: Any, name: str):
    model = made(name)
    seen, plain = (copy.deepcopy(one).train() for one in (model.model, model.plain))
    rows = model.rows()
    batch = Collator(0)(rows)
    labels = batch.pop("labels")
    picked = predictions(seen, batch, labels, use_cache=False)
    targets = labels[:, 1:][labels[:, 1:] != IGNORED]
    torch.nn.functional.cross_entropy(picked, targets, reduction="sum").backward()
    for number, row in enumerate(rows):
        inputs = model.inputs(number)
        if name == "gemma3" and "token_type_ids" not in inputs:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        logits = plain(**inputs).logits[0, :-1]
        wanted = torch.tensor(row["labels"][1:])
        torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()
    gradients = dict(plain.named_parameters())
    for key, p in seen.named_parameters():
        wanted = gradients[key].grad
        assert (p.grad is None) == (wanted is None), key
        if wanted is not None:
            torch.testing.assert_close(p.grad, wanted, atol=2e-5, rtol=2e-4, msg=lambda m, key=key: f"{key}: {m}")


@families
@torch.no_grad()
def test_the_head_gives_the_logits(made: Any, name: str):
    model = made(name).model
    batch = Collator(0)(made(name).rows())
    batch.pop("labels")
    outputs = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(head(model).logits(outputs.hidden_states[-1]), outputs.logits, atol=1e-5, rtol=1e-5)
    states = model(**batch, output_hidden_states=True, **hidden_only(model)).hidden_states[-1]
    torch.testing.assert_close(states, outputs.hidden_states[-1])
    assert keeps_its_loss(model)


@families
def test_generation_is_the_models_own(made: Any, name: str):
    model = made(name)
    encoder = model.encoder()
    prompts = [encoder.prompt(example, reserve=8) for example in model.examples]
    options = {"max_new_tokens": 4, "eos_token_ids": [2], "pad_token_id": 0}
    together = generate(model.model, prompts, batch_size=3, **options)
    assert together == [generate(model.model, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    for number in range(3):
        inputs = model.inputs(number)
        length = len(prompts[number])
        whole = {key for key, value in inputs.items() if value.shape == inputs["input_ids"].shape}
        own = {key: value[:, :length] if key in whole else value for key, value in inputs.items()}
        blocked = [model.sight.image_token_id]
        new = model.plain.generate(**own, max_new_tokens=4, do_sample=False, eos_token_id=2, suppress_tokens=blocked)
        assert [t for t in new[0, length:].tolist() if t not in (0, 2)] == together[number]


@torch.no_grad()
def test_likelihoods_are_those_of_a_plain_loop(made: Any):
    model = made("qwen2_5_vl")
    rows = model.rows()
    nats, tokens = token_losses(model.model, [*rows, *rows], batch_size=4, pad_token_id=0)
    for number, row in enumerate(rows):
        logits = model.plain(**model.inputs(number)).logits[0, :-1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")
        assert nats[number] == pytest.approx(float(wanted), rel=1e-5) == nats[number + 3]
        assert tokens[number] == sum(label != IGNORED for label in row["labels"][1:])


@families
def test_truncation_keeps_pictures_whole(made: Any, name: str):
    model = made(name)
    long = {"image": "0.png", "prompt": "see <image> " + "word " * 60, "answer": "yes"}
    [example] = to_examples([long], "prompt_answer", file=model.folder.parent / "train.json")
    [whole] = model.encoder(max_length=500).encode(example)
    places = [token for token in whole["input_ids"] if is_place(token)]
    [cut] = model.encoder(max_length=len(places) + 60).encode(example)
    assert len(cut["input_ids"]) == len(places) + 60 < len(whole["input_ids"])
    assert [token for token in cut["input_ids"] if is_place(token)] == places
    with pytest.raises(DataError, match=rf"row 1.*\({len(places)} of them pictures\)"):
        model.encoder(max_length=len(places) + 4).encode(example)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_no_place_of_a_picture_is_a_label_where_all_tokens_are(made: Any, template: str):
    encoder = made("smolvlm").encoder(supervise="all", template=template)
    for row in encoder.encode_all(made("smolvlm").examples):
        pairs = zip(row["input_ids"][1:], row["labels"][1:], strict=True)
        assert all(label == (IGNORED if is_place(token) else token) for token, label in pairs)


def test_a_plain_template_keeps_a_texts_own_signs_text(made: Any):
    model = made("llava")
    row = {"image": "0.png", "prompt": "a</s> <image>", "answer": "b"}
    [example] = to_examples([row], "prompt_answer", file=model.folder.parent / "train.json")
    [encoded] = model.encoder(template="plain").encode(example)
    ids = model.as_tokens(encoded["input_ids"])
    assert ids.count(2) == 1 and ids[-1] == 2  # the end of the answer
    assert ids.count(model.sight.image_token_id) == 4


def test_the_same_picture_twice_is_two_pictures(made: Any):
    model = made("llava")
    row = {"images": ["0.png", "0.png"], "prompt": "<image><image>x", "answer": "b"}
    [example] = to_examples([row], "prompt_answer", file=model.folder.parent / "train.json")
    [encoded] = model.encoder().encode(example)
    assert [picture.name for picture in pictures_in(encoded["input_ids"])] == ["0.png", "0.png"]


def test_a_row_whose_picture_is_gone_is_told(made: Any, tmp_path: Path):
    model = made("llava")
    [name] = write_pictures(tmp_path, 1, seed=9)
    [example] = to_examples([{"image": name, "prompt": "x", "answer": "b"}], "prompt_answer", file=tmp_path / "t.json")
    [row] = model.encoder().encode(example)
    write_pictures(tmp_path, 1, seed=10)
    (tmp_path / "10-0.png").rename(tmp_path / name)
    with pytest.raises(DataError, match="has changed since its row was read"):
        model.model(**Collator(0)([row]))
    forget(example.pictures)
    with pytest.raises(DataError, match="do not hold any more"):
        model.model(**Collator(0)([row]))


@families
def test_tuners_train_the_part_that_is_meant(made: Any, name: str):
    whole = made(name).plain
    parts, layers = Parts(whole), dict[str, set[str]]()
    for target in ("language", "vision", "projector", "all"):
        full = build(Named(name="full", target=target)).prepare(copy.deepcopy(whole))
        trained = {parts.of(key) for key, p in full.named_parameters() if p.requires_grad}
        assert trained == ({"language", "vision", "projector"} if target == "all" else {target})
        lora = build(Named(name="lora", target=target, r=2))
        if (name, target) == ("gemma3", "projector"):
            with pytest.raises(ConfigError, match=r"projector of Gemma3\w+ has no linear layer"):
                lora.prepare(copy.deepcopy(whole))
            layers[target] = set()
            continue
        adapted = (key.partition(".lora_A") for key, _ in lora.prepare(copy.deepcopy(whole)).named_parameters())
        layers[target] = {layer.removeprefix("base_model.model.") for layer, factor, _ in adapted if factor}
        assert layers[target] and (target == "all" or {parts.of(layer) for layer in layers[target]} == {target})
    alone = [layers[target] for target in ("language", "vision", "projector")]
    assert set().union(*alone) == layers["all"] and sum(map(len, alone)) == len(layers["all"])


def test_layers_that_the_part_lacks_are_told_with_the_part():
    tuner = build(Named(name="lora", target="projector", target_modules=["q_proj"], r=2))
    with pytest.raises(
        ConfigError, match=r"target_modules.*\(target=projector leaves out every other part of the model"
    ):
        tuner.prepare(seeing_model("llava")[0])


@families
def test_an_empty_picture_changes_nothing(made: Any, name: str, monkeypatch: pytest.MonkeyPatch):
    """What a process without pictures does, so that others' collectives find it."""
    model = copy.deepcopy(made(name).model)
    batch = Collator(0)(made(name).rows()[2:])
    plain = model(**batch).loss
    monkeypatch.setattr("holdfast.models.sight._must_go_along", lambda model: True)
    with_blank = model(**batch).loss
    torch.testing.assert_close(with_blank, plain)
    with_blank.backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None]
    gone = [key for key in unused if Parts(model).of(key) == "projector"]
    assert not gone, gone


@families
def test_no_text_is_taken_for_a_part_of_a_picture(made, name):
    model = made(name)
    token = model.sight.image_token
    [example] = to_examples([{"text": f"the {token} tag"}], "text", file=model.folder / "train.json")
    with pytest.raises(DataError, match=r"row 1: its text has .* in it, which stands for a part of a picture"):
        model.encoder().encode(example)
    [row] = model.encoder(template="plain").encode(example)
    general, other = general_rows(model.tokenizer, texts=[f"the {token} tag", "a</s>b"], no_text=token)
    assert model.sight.image_token_id not in row["input_ids"] + general["input_ids"]
    assert model.tokenizer.eos_token_id in other["input_ids"]


def test_a_picture_of_a_shape_that_the_processor_refuses_is_named(made, tmp_path):
    Image.new("RGB", (3000, 10)).save(tmp_path / "long.png")
    row = {"image": "long.png", "prompt": "what?", "answer": "a"}
    [example] = to_examples([row], "prompt_answer", file=tmp_path / "train.json")
    with pytest.raises(DataError, match=r"row 1: the model's processor does not take .*\(long.png 3000x10\): absolute"):
        made("qwen2_5_vl").encoder().encode(example)


def test_a_mixture_of_experts_is_of_the_language_model_alone():
    with pytest.raises(ConfigError, match=r"tuner moe_lora: target: .*language"):
        build(Named(name="moe_lora", target="vision"))
