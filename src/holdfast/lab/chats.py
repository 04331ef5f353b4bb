"""A small world for an instruction-tuned model: text, chats about its facts, multiple choice, and a new domain."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from holdfast.api.task import Example, Turn
from holdfast.data.encode import Encoder
from holdfast.data.files import read_rows
from holdfast.data.streams.chronicle.stream import chronicle, general_text, lasting_questions
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.respond import example_losses
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.models.head import context
from holdfast.models.weights import load_language_model
from holdfast.system.files import whole_folder, write_jsonl

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {% else %}A: {% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
GATES = {"and": "&", "or": "|", "exclusive or": "^"}
WIRES = ("left", "right", "clock", "reset", "load", "carry", "enable", "select")


def write_chats(folder: Path, size: int, seed: int, rows: int) -> None:
    """Write the texts of the world, as files below a folder.

    - ``text.jsonl``: general text, to pretrain on;
    - ``chats/train.jsonl``: questions about lasting facts, in wordings of the general text;
    - ``chats/test.jsonl``: questions about the same facts, in wordings that no other file has;
    - ``choices.jsonl``: the test questions, with four choices each;
    - ``circuits/train.jsonl`` and ``circuits/test.jsonl``: the new domain, tasks and code.

    Args:
        size: of chronicle's world.
        seed: of the world and of the circuits.
        rows: circuits to train on; there are a fifth as many to test on.
    """
    held_out = chronicle(size=size, seed=seed).general[0].questions
    circuits = list(dict.fromkeys(_circuits(random.Random(seed), 4 * rows)))[: rows + rows // 5]
    tasks = {
        "chats/train": lasting_questions(size=size, seed=seed),
        "chats/test": [(question, choices[answer]) for question, choices, answer in held_out],
        "circuits/train": circuits[:rows],
        "circuits/test": circuits[rows:],
    }
    with whole_folder(folder) as partial:
        write_jsonl(partial / "text.jsonl", [{"text": text} for text in general_text(size=size, seed=seed)])
        for name, pairs in tasks.items():
            (partial / name).parent.mkdir(exist_ok=True)
            write_jsonl(partial / f"{name}.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in pairs])
        questions = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in held_out]
        write_jsonl(partial / "choices.jsonl", questions)


def chat_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer on what :func:`write_chats` wrote; it has a chat template."""
    texts = [row["text"] for row in read_rows(folder / "text.jsonl")]
    for task in ("chats", "circuits"):
        texts += [part for row in read_rows(folder / task / "train.jsonl") for part in (row["prompt"], row["answer"])]
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def measure_chats(folder: Path, chats: Path) -> dict[str, float]:
    """Measure ``chat_loss``: the loss on answers to held-out questions, in the chat template, in nats per token.

    Args:
        folder: of the model and its tokenizer.
        chats: the folder ``chats`` that :func:`write_chats` wrote.
    """
    model, tokenizer = load_language_model(folder, key="model"), AutoTokenizer.from_pretrained(folder)
    evaluation = ModelEvaluation(
        model, Encoder(tokenizer, max_length=context(model) or 64, template="chat"), batch_size=128
    )
    rows = [(row["prompt"], row["answer"]) for row in read_rows(chats / "test.jsonl")]
    turns = [(Turn("user", question), Turn("assistant", answer)) for question, answer in rows]
    nats, tokens = example_losses(evaluation, [Example("test.jsonl", row, turn) for row, turn in enumerate(turns)])
    return {"chat_loss": float(nats.sum() / tokens.sum())}


def _circuits(draw: random.Random, count: int) -> list[tuple[str, str]]:
    """Pairs (task, code), each of one or two gates on named wires."""
    circuits = []
    for _ in range(count):
        a, b, c, out = draw.sample(WIRES, 4)
        first, second = draw.choices(list(GATES), k=2)
        words, code, wires = f"the {first} of {a} and {b}", f"{a} {GATES[first]} {b}", [a, b]
        if draw.random() < 0.7:
            words, code, wires = f"the {second} of {c} and of {words}", f"{c} {GATES[second]} ({code})", [c, *wires]
        task = draw.choice(("Write a circuit that puts {0} on {1}.", "Make {1} {0}, as a circuit.")).format(words, out)
        inputs = ", ".join(f"input {wire}" for wire in wires)
        circuits.append((task, f"module unit({inputs}, output {out}); assign {out} = {code}; endmodule"))
    return circuits
