"""Pretraining a small model from texts: it learns, repeats itself and can be loaded."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.data.streams.chronicle.stream import general_text
from holdfast.errors import ConfigError, DataError
from holdfast.lab.small import pack, pretrain_small
from holdfast.lab.tokenizer import train_tokenizer

SMALL = {"hidden": 32, "layers": 1, "heads": 2, "context": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def texts():
    return general_text(4)[:300]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400, model_max_length=32)


@pytest.fixture(scope="module")
def small(texts, tokenizer, tmp_path_factory):
    told = []
    folder = tmp_path_factory.mktemp("lab") / "model"
    pretrain_small(texts, tokenizer, folder, **SMALL, steps=60, on_step=lambda done, steps: told.append((done, steps)))
    return folder, told


def test_packing_keeps_every_token_in_order(tokenizer):
    texts = ["One.", "Two and two.", "Three."]
    stream = []
    for text in texts:
        stream += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    blocks = pack(texts, tokenizer, 5)
    assert blocks.shape == (len(stream) // 5, 5)
    assert blocks.flatten().tolist() == stream[: len(stream) // 5 * 5]


def test_texts_shorter_than_a_block_are_refused(tokenizer):
    with pytest.raises(DataError, match="one block is 32"):
        pack(["short"], tokenizer, 32)


def test_pretraining_learns_and_its_folder_loads(texts, tokenizer, small):
    folder, told = small
    model, loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert loaded(texts[:5])["input_ids"] == tokenizer(texts[:5])["input_ids"]
    assert (loaded.model_max_length, loaded.padding_side) == (32, "left")
    blocks = pack(texts, loaded, 32)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert loss < 0.75 * math.log(len(loaded))
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == loaded.eos_token_id
    assert told == [(step, 60) for step in range(1, 61)]


def test_nothing_in_the_folder_needs_unpickling(small):
    folder, _ = small
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    assert not list(folder.parent.glob("*.partial"))


def test_the_seed_decides_the_weights(texts, tokenizer, tmp_path):
    weights = []
    for number, seed in enumerate([3, 3, 4]):
        torch.manual_seed(number)
        folder = pretrain_small(texts, tokenizer, tmp_path / str(number), **SMALL, steps=4, seed=seed)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize(
    ("change", "message"), [({"hidden": 30}, "multiple of twice the heads"), ({"steps": 0}, "at least 1")]
)
def test_arguments_out_of_range_are_refused(texts, tokenizer, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        pretrain_small(texts, tokenizer, tmp_path / "model", **{"steps": 1} | SMALL | change)
    assert not (tmp_path / "model").exists()
