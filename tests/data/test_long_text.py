"""Tokens of a long text that are made stretch by stretch are those of the whole text, and so are their places."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from holdfast.api.task import Example, Turn
from holdfast.data import encode as encoders
from holdfast.data import long_text
from holdfast.data.encode import Encoder
from holdfast.data.long_text import LongEncoding, encoding_of
from support.tiny import tiny_tokenizer

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
PARTS = (
    "tide",
    "holds",
    "fast",
    " ",
    "  ",
    "\n",
    "\n\n",
    "12",
    "34567",
    "é",
    "日本",
    "👍🏽",
    ".",
    "...",
    "aaaa",
    "Don't",
    "\t",
)


def tokenizer(kind: str) -> Tokenizer:
    texts = [text_of(seed, 400) for seed in range(20)]
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=ALPHABET))
    elif kind == "digits":
        made = Tokenizer(models.BPE())
        divided = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([divided, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=ALPHABET))
    elif kind == "undivided":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Metaspace()
        made.train_from_iterator([" ".join(texts)], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"]))
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.train_from_iterator(
            texts, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"])
        )
    return made


def text_of(seed: int, parts: int) -> str:
    chance = random.Random(seed)
    return "".join(chance.choices(PARTS, k=parts))


def encode(kind: str) -> Callable[[str], Any]:
    made = tokenizer(kind)
    return lambda text: made.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["bytes", "digits", "undivided", "unigram"])
def test_stretches_make_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(long_text, "STRETCH", 600)
    monkeypatch.setattr(long_text, "OVERLAP", 300)
    work, joined = encode(kind), 0
    for seed in range(20):
        text = text_of(seed, 300 + 10 * seed)
        found, whole = encoding_of(text, work), work(text)
        joined += isinstance(found, LongEncoding)
        assert (found.ids, [tuple(place) for place in found.offsets], len(found)) == (
            whole.ids,
            whole.offsets,
            len(whole),
        )
    assert joined > 15


def test_where_stretches_do_not_agree_the_whole_is_encoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(long_text, "STRETCH", 100)
    monkeypatch.setattr(long_text, "OVERLAP", 40)
    work = encode("bytes")
    for text in ("a" * 1001, "1" * 999, " " * 1000, "word " * 5 + "a" * 1000, ""):
        assert encoding_of(text, work).ids == work(text).ids


@pytest.mark.parametrize("chat", [None, "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}§{% endfor %}"])
def test_rows_of_long_texts_are_cut_as_they_were(chat: str | None, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny_tokenizer("§")
    tokenizer.chat_template = chat and chat + "{% if add_generation_prompt %}<assistant>{% endif %}"
    question = f" say: {text_of(1, 900)} "
    examples = [
        Example("f", 0, (Turn("user", question, (6, len(question))), Turn("assistant", "yes"))),
        Example("f", 1, (Turn("user", "say"), Turn("assistant", text_of(2, 900)))),
        Example("f", 2, text=text_of(3, 900)),
    ]
    own = Encoder(tokenizer, max_length=64, long_answers="cut")
    expected, tally = own.encode_all(examples), own.tally
    monkeypatch.setattr(encoders, "STRETCH", 300)
    monkeypatch.setattr(long_text, "STRETCH", 300)
    monkeypatch.setattr(long_text, "OVERLAP", 200)
    made: list[int] = []
    monkeypatch.setattr(encoders, "encoding_of", lambda text, work: made.append(len(text)) or encoding_of(text, work))
    other = own.apart()
    assert other.encode_all(examples) == expected and other.tally == tally and max(made) > 1000
