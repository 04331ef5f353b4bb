"""The data of the paper's experiment on an instruction-tuned model: Verilog, general text and multiple choice."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from holdfast.system.files import whole_folder, write_jsonl

VerilogRow = dict[str, Any]
QUESTIONS = {
    "mmlu": ("cais/mmlu", "all", "test"),
    "arc": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "commonsense": ("tau/commonsense_qa", None, "validation"),
}


def write_verilog(folder: Path, rows: int, test_rows: int, documents: int, questions: int) -> None:
    """Download and write what the experiment reads: ``verilog`` (a task), ``general.jsonl``, ``choices/NAME.jsonl``.

    Args:
        rows: number of programs to train on.
        test_rows: number of programs to test on; they precede the others in the dataset.
        documents: number of documents of general text.
        questions: number of questions from each set, evenly spread over it.

    Raises:
        DataError: a dataset cannot be read.
    """
    from holdfast.data.texts import dataset_texts

    programs = itertools.islice(pairs(_rows("bnadimi/PyraNet-Verilog", None, "train")), rows + test_rows)
    with whole_folder(folder) as partial:
        for part in ("verilog", "choices"):
            (partial / part).mkdir()
        task = [{"prompt": prompt, "answer": answer} for prompt, answer in programs]
        write_jsonl(partial / "verilog" / "test.jsonl", task[:test_rows])
        write_jsonl(partial / "verilog" / "train.jsonl", task[test_rows:])
        texts = itertools.islice(dataset_texts("allenai/dolmino-mix-1124", "dclm", "train", "text"), documents)
        write_jsonl(partial / "general.jsonl", [{"text": text} for text in texts])
        for name, source in QUESTIONS.items():
            every = [question(row) for row in _rows(*source)]
            write_jsonl(partial / "choices" / f"{name}.jsonl", every[:: max(1, len(every) // questions)][:questions])


def pairs(rows: Iterable[VerilogRow]) -> Iterator[tuple[str, str]]:
    """Pairs (request, program) of PyraNet's rows that compile and have a whole module with a description."""
    for row in rows:
        try:
            about = json.loads(row["description"])
        except (TypeError, ValueError):
            continue
        described, code = about.get("description"), row.get("code")
        if about.get("compile_status") != "No error!" or not isinstance(described, str) or not isinstance(code, str):
            continue
        described, code = described.strip(), code.strip()
        whole = re.search(r"\bmodule\b", code) and re.search(r"\bendmodule\b", code)
        if len(described) >= 16 and whole and code[0] not in "['\"" and ("\n" in code or "\\n" not in code):
            yield f"Write the following Verilog program. {described}", code


def question(row: VerilogRow) -> VerilogRow:
    """A row of MMLU, ARC or CommonsenseQA as question, choices and answer (an index of choices)."""
    choices = row["choices"]
    if isinstance(choices, dict):
        return {
            "question": row["question"],
            "choices": list(choices["text"]),
            "answer": list(choices["label"]).index(row["answerKey"]),
        }
    return {"question": row["question"], "choices": list(choices), "answer": row["answer"]}


def _rows(dataset: str, subset: str | None, split: str) -> Iterator[VerilogRow]:
    from datasets import load_dataset

    from holdfast.errors import DataError

    try:
        yield from load_dataset(dataset, subset, split=split, streaming=True)
    except Exception as error:  # whatever a hub or a disk may raise
        raise DataError(f"dataset {dataset!r} cannot be read: {error}") from None
