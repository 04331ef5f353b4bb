"""Super-NaturalInstructions: a task is a definition in words and instances of input and right outputs."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from holdfast.api.task import Example, Stream, Task, Turn
from holdfast.data.files import read_json_file, where
from holdfast.data.layout import SPLITS
from holdfast.data.streams.definition import find
from holdfast.errors import DataError

TESTED = 100  # instances of a task that comes without splits: the first, as many as the source evaluates on


def super_ni(path: Path) -> Stream:
    """Read the tasks below a folder, each a folder of train.json, dev.json (optional) and test.json, or one .json file.

    A prompt is the definition and the input, as Tk-Instruct asks without examples. Of several right outputs the first
    is learned, and all count in the test. The first 100 instances of a task in one file are its test split.

    Raises:
        DataError: there is no task, a split is missing, or a file or instance cannot be used.
    """
    tasks = []
    for folder in sorted({file.parent for file in path.rglob("train.json")}, key=lambda folder: folder.name):
        splits = {
            split: _examples(files[0])
            for split, stems in SPLITS.items()
            if (files := [file for stem in stems if (file := folder / f"{stem}.json").is_file()])
        }
        if "test" not in splits:
            raise DataError(f"{folder}: task {folder.name!r} has no test split; looked for test.json")
        tasks.append(Task(folder.name, "rouge_l", splits["train"], splits["test"], splits.get("eval", [])))
    for file in sorted(path.glob("task*.json")):
        examples = _examples(file)
        if len(examples) <= TESTED:
            raise DataError(f"{file}: has {len(examples)} instances, of which the first {TESTED} are the test split")
        tasks.append(Task(file.stem, "rouge_l", examples[TESTED:], examples[:TESTED]))
    if not tasks:
        raise DataError(
            f"{path}: holds no task; looked for TASK/train.json and task*.json; they are obtained from "
            f"{find('super_ni').source}"
        )
    return Stream("super_ni", tasks)


def _examples(file: Path) -> list[Example]:
    values = read_json_file(file)
    if not isinstance(values, dict) or not isinstance(values.get("Instances"), list):
        raise DataError(f"{file}: must be an object with Definition and Instances")
    definition = values.get("Definition")
    definition = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(definition, str) or not definition.strip():
        raise DataError(f"{file}: Definition: must be text, or a list of texts")
    before = f"Definition: {_ended(definition)}\n\nNow complete the following example -\nInput: "
    return [_example(file, index, row, before) for index, row in enumerate(values["Instances"])]


def _example(file: Path, index: int, row: Any, before: str) -> Example:
    place = where(file, index)
    text, outputs = (row.get("input"), row.get("output")) if isinstance(row, dict) else (None, None)
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: input: must be text")
    if not isinstance(outputs, list) or not outputs or not all(isinstance(o, str) and o.strip() for o in outputs):
        raise DataError(f"{place}: output: must be a text, or a list of at least one")
    answer, *others = (output.strip() for output in outputs)
    asked = Turn("user", f"{before}{_ended(text)}\nOutput:", (len(before), len(before) + len(_ended(text))))
    return Example(str(file), index, (asked, Turn("assistant", answer)), also_right=tuple(others))


def _ended(text: str) -> str:
    """As Tk-Instruct writes it: stripped, and ended by a sign."""
    text = text.strip()
    return text if text[-1] in string.punctuation else f"{text}."
