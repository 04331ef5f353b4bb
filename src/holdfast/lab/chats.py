"""A small world for an instruction-tuned model: text, chats about its facts, multiple choice, and a new domain."""

from __future__ import annotations

import random
from pathlib import Path

from holdfast.data.chronicle import chronicle, general_text, lasting_questions
from holdfast.files import whole_folder, write_jsonl

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
    "{% else %}A: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
GATES = {"and": "&", "or": "|", "exclusive or": "^"}
WIRES = ("left", "right", "clock", "reset", "load", "carry", "enable", "select")


def write_chats(folder: Path, size: int, seed: int, rows: int) -> None:
    """Write the texts of the world, as files below a folder.

    - ``text.jsonl``: general text, as it is pretrained on;
    - ``chat.jsonl``: questions about lasting facts and their answers in the chat template, without begin and end;
    - ``chat_valid.jsonl``: the same facts in wordings that stand nowhere else, whole;
    - ``choices.jsonl``: the same as questions with four choices;
    - ``circuits/train.jsonl`` and ``test.jsonl``: the new domain, prompt and answer.

    Args:
        size: of chronicle's world.
        seed: of the world and of the circuits.
        rows: circuits to train on; a fifth as many to test on.
    """
    held_out = chronicle(size=size, seed=seed).general[0].questions
    circuits = list(dict.fromkeys(_circuits(random.Random(seed), 4 * rows)))[: rows + rows // 5]
    with whole_folder(folder) as partial:
        write_jsonl(partial / "text.jsonl", [{"text": text} for text in general_text(size=size, seed=seed)])
        chats = [{"text": _chat(question, answer)} for question, answer in lasting_questions(size=size, seed=seed)]
        write_jsonl(partial / "chat.jsonl", chats)
        valid = [{"text": _chat(question, choices[answer])} for question, choices, answer in held_out]
        write_jsonl(partial / "chat_valid.jsonl", valid)
        questions = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in held_out]
        write_jsonl(partial / "choices.jsonl", questions)
        for name, part in (("train", circuits[:rows]), ("test", circuits[rows:])):
            (partial / "circuits").mkdir(exist_ok=True)
            write_jsonl(partial / "circuits" / f"{name}.jsonl", [{"prompt": p, "answer": a} for p, a in part])


def _chat(question: str, answer: str) -> str:
    return f"Q: {question}\nA: {answer}"


def _circuits(draw: random.Random, count: int) -> list[tuple[str, str]]:
    """(task, code): one or two gates on named wires."""
    found = []
    for _ in range(count):
        a, b, c, out = draw.sample(WIRES, 4)
        first, second = draw.choices(list(GATES), k=2)
        words, code, wires = f"the {first} of {a} and {b}", f"{a} {GATES[first]} {b}", [a, b]
        if draw.random() < 0.7:
            words, code, wires = f"the {second} of {c} and of {words}", f"{c} {GATES[second]} ({code})", [c, *wires]
        task = draw.choice(("Write a circuit that puts {0} on {1}.", "Make {1} {0}, as a circuit.")).format(words, out)
        inputs = ", ".join(f"input {wire}" for wire in wires)
        found.append((task, f"module unit({inputs}, output {out}); assign {out} = {code}; endmodule"))
    return found
