"""Rows of a large task that several processes encode, chunk by chunk, are those of an encoder that sees one by one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from holdfast.api.task import Example, Turn
from holdfast.data import arrow_rows
from holdfast.data.encode import Encoder
from holdfast.data.on_disk import OnDisk
from holdfast.errors import DataError
from holdfast.runner import large_rows
from holdfast.runner.large_rows import encode_large
from support.tiny import tiny_tokenizer

TEMPLATES = {
    "plain": None,
    "chat": "{% for m in messages %}<{{ m.role }}>{{ m.content }}§{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "marks": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}§"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "strips": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}


def examples() -> list[Example]:
    """Questions and conversations of several lengths in two files; some cannot be encoded."""
    found = []
    for i in range(20):
        question = f" say {i} " + "word " * (40 if i % 7 == 3 else 3) + "\n"
        turns = (Turn("user", question, (6, len(question))), Turn("assistant", f"answer {i}"))
        if i % 4 == 1:
            turns = (Turn("system", "be brief"), *turns, Turn("user", "more?"), Turn("assistant", "§" * (i % 3 + 1)))
        found.append(Example(f"{'ab'[i // 12]}.jsonl", i, turns))
    for i in (6, 7):
        found[i] = replace(found[i], turns=(Turn("user", "x" * 300), Turn("assistant", "y")))
    found[16] = replace(
        found[16], turns=(Turn("user", f"what is {tiny_tokenizer().eos_token}"), Turn("assistant", "y"))
    )
    found[13] = replace(found[13], turns=(Turn("user", "q"), Turn("assistant", "answer " * 40)))
    return found


def encoder(template: str | None, long_answers: str = "error") -> Encoder:
    tokenizer = tiny_tokenizer("§")
    tokenizer.chat_template = template
    return Encoder(tokenizer, max_length=100, long_answers=long_answers)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_labels_counts_and_messages_are_those_of_row_by_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    one = encoder(TEMPLATES[name], "cut" if name == "marks" else "error")
    rows, bad, left = [], [], []
    with caplog.at_level(logging.WARNING, "holdfast"):
        for example in examples():
            try:
                rows += one.encode(example)
            except DataError as error:
                bad.append(str(error))
            else:
                left.append(example)
    longest = max(map(one.answer_length, left))
    warned = [record.getMessage() for record in caplog.records]
    assert 0 < len(bad) < 8 and one.truncated and len(warned) == {"plain": 0, "no system": 2}.get(name, 1)
    monkeypatch.setattr(arrow_rows, "CHUNK", 3)
    for processes, cache in ((1, None), (3, None), (2, tmp_path)):
        monkeypatch.setattr(large_rows, "forks", lambda count=processes: count)
        own = encoder(TEMPLATES[name], "cut" if name == "marks" else "error")
        caplog.clear()
        told: list[str] = []
        found, made = encode_large(OnDisk(examples()), own, cache and str(cache), told)
        assert (list(found), list(made), told, own.tally.longest) == (left, rows, bad, longest)
        assert (own.tally.shortened, own.tally.cut) == (one.tally.shortened, one.tally.cut)
        assert [record.getMessage() for record in caplog.records] == warned


def test_an_error_ends_all_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrow_rows, "CHUNK", 1)
    monkeypatch.setattr(large_rows, "forks", lambda: 3)
    monkeypatch.setattr(Encoder, "_row", lambda self, example, *_: {"row": 1 // (8 - example.row)})
    before = set(psutil.Process().children())
    with pytest.raises(ZeroDivisionError):
        encode_large(examples(), encoder(None), None, [])
    assert set(psutil.Process().children()) == before
