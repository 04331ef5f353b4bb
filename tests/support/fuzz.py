"""Bad input, made from a seed: wrong values, damaged runs, broken models, wrong command lines, and what became of them.

Each case is a command line in a folder of its own. It must end with a message or a result, soon, and never with a
traceback; where the input cannot mean what it says, it must be refused.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save

from holdfast.cli import main
from holdfast.config.describe import describe
from holdfast.config.run import RunConfig
from holdfast.methods import METHODS
from holdfast.tuners import TUNERS

SECONDS = 120
"""A case that takes longer hangs; the machine may be busy."""

NEVER = {
    "infinity": ".inf",
    "minus infinity": "-.inf",
    "no number": ".nan",
    "beyond floats": "1e999",
    "many digits": "1" * 5000,
    "deep list": "[" * 2000 + "]" * 2000,
    "deep mapping": "{a: " * 2000 + "1" + "}" * 2000,
    "half a surrogate": r'"\ud800"',
    "end of a path": r'"a\0b"',
    "key twice": "{a: 1, a: 2}",
    "no date": "!!timestamp 2024-13-45",
    "alias of itself": "&a [*a]",
    "bomb": "[&a [1,1,1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], "
    "&d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d], [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]]",
}
"""YAML that no key takes."""

SOMETIMES = {
    "nothing": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "a big number": "10000000000000000000",
    "a huge number": "1e300",
    "a tiny number": "1e-300",
    "a fraction": "0.5",
    "a date": "2024-01-02",
    "a date that is none": "2024-13-45",
    "no text": '""',
    "a blank": '" "',
    "a word": "nonsense",
    "a path": "/no/such/path",
    "a folder": ".",
    "a long word": "x" * 5000,
    "signs": r'"\e[31m [/red] {x} %s \\ \U0001F600"',
    "no list": "[]",
    "no mapping": "{}",
    "a list": "[1, a, null]",
    "a list of lists": "[[1], [[2]]]",
    "a mapping": "{a: 1}",
    "a mapping by numbers": "{1: 2}",
    "a name without options": "{name: nonsense}",
    "a name that is none": "{name: [1]}",
    "a set": "!!set {a, b}",
    "bytes": "!!binary aGVsbG8=",
    "pairs": "!!pairs [a: 1]",
}
"""YAML that some key takes."""


@dataclass(frozen=True)
class Case:
    """A command line to be tried.

    Attributes:
        name: what is wrong.
        arguments: of holdfast, in the folder that ``prepare`` fills.
        codes: the exit codes that may be.
    """

    name: str
    arguments: list[str]
    codes: tuple[int, ...] = (0, 2)
    prepare: Callable[[Path], None] = lambda folder: None


class HangsError(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise HangsError in the main thread after so many seconds."""

    def stop(number: int, frame: object) -> None:
        raise HangsError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(case: Case, folder: Path) -> str | None:
    """What is wrong with what became of a case; None if nothing is. The working directory is the folder."""
    case.prepare(folder)
    said = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        mock.patch("sys.argv", ["holdfast", *case.arguments]),
        mock.patch("sys.stdin", io.StringIO()),
        mock.patch("sys.excepthook", sys.excepthook),
    ):
        try:
            with limited(SECONDS):
                main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code or 0
        except HangsError:
            return f"{case.name}: hangs\n{said.getvalue()[-500:]}"
        except BaseException:
            return f"{case.name}: traceback\n{traceback.format_exc()[-2500:]}"
    if "Traceback (most recent call last)" in said.getvalue():
        return f"{case.name}: traceback\n{said.getvalue()[-2500:]}"
    if code not in case.codes:
        return f"{case.name}: exit code {code}, not one of {case.codes}\n{said.getvalue()[-700:]}"
    if code == 2 and not said.getvalue().strip():
        return f"{case.name}: refused without a word"
    return None


# --- configurations ---


def keys() -> list[str]:
    """Every key of a run's configuration, with those of every method's and tuner's options."""
    found = [key for key, _, _ in describe(RunConfig)]
    for prefix, registry in (("method", METHODS), ("tuner", TUNERS)):
        for name in registry.own:
            found += [f"{prefix}:{name}.{key}" for key, _, _ in registry.page(name).options]
    return found


def configuration_cases(base: dict[str, Any]) -> list[Case]:
    """Every key with every bad value, in a file; and with some on the command line."""
    cases = []
    for key in keys():
        for name, text in (NEVER | SOMETIMES).items():
            codes = (2,) if name in NEVER else (0, 2)
            cases.append(
                Case(f"{key}: {name}", ["check", "c.yaml"], codes, lambda f, k=key, t=text: _write(f, base, k, t))
            )
    return cases


def override_cases(base: dict[str, Any]) -> list[Case]:
    """Bad values, keys and forms on the command line."""
    cases = []
    for key in [key for key in keys() if ":" not in key]:
        for name, text in (NEVER | SOMETIMES).items():
            codes = (2,) if name in NEVER else (0, 2)
            cases.append(
                Case(f"{key}={name}", ["check", "c.yaml", f"{key}={text}"], codes, lambda f: _write(f, base, "", ""))
            )
    return cases


def _write(folder: Path, base: dict[str, Any], key: str, text: str) -> None:
    """c.yaml: the configuration, with one value replaced by a piece of YAML."""
    values, mark = copy.deepcopy(base), "REPLACED"
    if key:
        owner, colon, rest = key.partition(":")
        if colon:
            name, _, below = rest.partition(".")
            values[owner] = {"name": name, below: mark}
        else:
            *parents, last = key.split(".")
            place: Any = values
            for parent in parents:
                below_ = place.get(parent)
                if not isinstance(below_, dict):
                    below_ = {"name": below_} if isinstance(below_, str) else {}
                place[parent] = below_
                place = below_
            place[last] = mark
    (folder / "c.yaml").write_text(
        yaml.safe_dump(values, default_flow_style=False, width=10**6).replace(mark, text), encoding="utf-8"
    )


# --- files ---


def damages(content: bytes, chance: random.Random) -> dict[str, bytes]:
    """A file's content, damaged in several ways."""
    cut, place = chance.randrange(max(1, len(content))), chance.randrange(max(1, len(content)))
    flipped = bytearray(content or b"\0")
    flipped[place % len(flipped)] ^= 1 << chance.randrange(8)
    return {
        "emptied": b"",
        "cut": content[:cut],
        "flipped": bytes(flipped),
        "zeros": bytes(len(content)),
        "noise": chance.randbytes(max(1, min(len(content), 1000))),
        "a list": b"[]\n",
        "an object": b"{}\n",
        "null": b"null\n",
        "a number": b"3\n",
        "a string": b'"x"\n',
        "deep": b"[" * 100_000,
        "many digits": b'{"a": ' + b"1" * 5000 + b"}\n",
        "half a surrogate": b'{"a": "\\ud800"}\n',
        "a name twice": b'{"a": 1, "a": 2}\n',
    }


def json_damages(content: bytes, chance: random.Random, count: int) -> dict[str, bytes]:
    """A JSON file with values, anywhere in it, replaced by values of other kinds, or keys removed."""
    lines = content.decode().split("\n") if content else []
    try:
        whole = json.loads(content)
        lines = []
    except ValueError:
        whole = None
    found = {}
    for number in range(count):
        if whole is not None:
            root = [copy.deepcopy(whole)]
        else:
            chosen = [i for i, line in enumerate(lines) if line]
            if not chosen:
                break
            place = chance.choice(chosen)
            root = [json.loads(lines[place])]
        what = _damage_value(root, chance)
        text = json.dumps(root[0]) if root else "null"
        if whole is None:
            text = "\n".join([*lines[:place], text, *lines[place + 1 :]])
        found[f"{number}: {what}"] = text.encode()
    return found


def _damage_value(root: list[Any], chance: random.Random) -> str:
    """Replace or remove one value somewhere below a list of one value."""
    holder: Any = root
    place: Any = 0
    path = ""
    while chance.random() < 0.85:
        value = holder[place]
        if isinstance(value, dict) and value:
            holder, place = value, chance.choice(sorted(value))
        elif isinstance(value, list) and value:
            holder, place = value, chance.randrange(len(value))
        else:
            break
        path += f".{place}"
    if holder is not root and chance.random() < 0.3:
        del holder[place]
        return f"without {path}"
    replaced = chance.choice(
        [None, True, -1, 0, 10**30, 1.5, "", "x", "../../x", "\x1b[31m", [], {}, [[]], {"a": 1}, ["x"], [None], 1e308]
    )
    holder[place] = replaced
    return f"{path} is {replaced!r}"


def tensor_damages(file: Path, chance: random.Random) -> dict[str, bytes]:
    """A safetensors file with another tensor in the place of one, in ways that its reader must look for."""
    tensors = load_file(file)
    if not tensors:
        return {"one tensor more": save({"x": torch.zeros(2)})}
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    others = {
        "a scalar": torch.tensor(1.0),
        "empty": torch.zeros(0),
        "of five dimensions": torch.zeros(1, 2, 1, 2, 1),
        "twice as long": torch.cat([tensor.flatten()] * 2),
        "of bytes": tensor.to(torch.uint8),
        "of other values": torch.full_like(tensor, 100),
        "below zero": torch.full_like(tensor, -1) if tensor.is_signed() else tensor,
    }
    rest = {key: value for key, value in tensors.items() if key != name}
    found = {f"{name} {what}": save({**rest, name: other.contiguous()}) for what, other in others.items()}
    return found | {f"without {name}": save(rest), "no tensors": save({})}


def torch_damages(file: Path, chance: random.Random) -> dict[str, bytes]:
    """A file of torch.save with other plain values in it."""
    value = torch.load(file, weights_only=False)  # the test's own
    others: dict[str, Any] = {"nothing": None, "a list": [], "no entries": {}, "a tensor": torch.zeros(2)}
    if isinstance(value, dict):
        name = chance.choice(sorted(value))
        rest = {key: below for key, below in value.items() if key != name}
        others |= {f"without {name}": rest} | {
            f"{name} is {wrong!r}": {**rest, name: wrong} for wrong in (None, "x", [])
        }
    found = {}
    for what, other in others.items():
        buffer = io.BytesIO()
        torch.save(other, buffer)
        found[what] = buffer.getvalue()
    return found


def run_commands(chance: random.Random) -> list[list[str]]:
    """Commands that read a run's directory."""
    return [
        ["report", "run"],
        ["compare", "run"],
        ["gate", "run", "--max-forgetting", "1"],
        ["export", "run", "--to", "out"],
        ["evaluate", "run"],
        ["run", "config.yaml"],
    ]


def damaged_run_cases(original: Path, seed: int, each: int) -> list[Case]:
    """A finished run of which one file is damaged, removed or a folder, read by every command.

    Args:
        original: a folder with ``run`` and ``config.yaml``.
        each: how many damages within the values of each JSON file.
    """
    chance = random.Random(seed)
    cases = []
    for file in sorted(path for path in (original / "run").rglob("*") if path.is_file()):
        name, content = file.relative_to(original), file.read_bytes()
        if file.name in (".lock", "report.html"):
            continue
        kinds: dict[str, bytes | None] = {"removed": None, "a folder": b"\0folder"} | damages(content, chance)
        kinds |= json_damages(content, chance, each) if file.suffix in (".json", ".jsonl") else {}
        kinds |= tensor_damages(file, chance) if file.suffix == ".safetensors" else {}
        kinds |= torch_damages(file, chance) if file.suffix in (".pt", ".pth") else {}
        for what, damaged in kinds.items():
            command = chance.choice(run_commands(chance))
            cases.append(
                Case(
                    f"{' '.join(command)}: {name} {what}",
                    command,
                    (0, 2, 3) if command[0] in ("gate", "run") else (0, 2),
                    lambda f, n=name, d=damaged: _damage(original, f, n, d),
                )
            )
    return cases


def _damage(original: Path, folder: Path, name: Path, content: bytes | None) -> None:
    shutil.copytree(original, folder, dirs_exist_ok=True)
    file = folder / name
    file.unlink()
    if content == b"\0folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)


def broken_model_cases(original: Path, base: dict[str, Any], seed: int, each: int) -> list[Case]:
    """A model's folder of which one file is damaged, checked."""
    return _broken_folder_cases(
        original, ["check", "c.yaml"], lambda f: _write(f, base | {"model": "model"}, "", ""), seed, each
    )


def broken_conversion_cases(original: Path, seed: int, each: int) -> list[Case]:
    """A folder to convert of which one file is damaged."""
    return _broken_folder_cases(original, ["convert", "model", "out"], lambda f: None, seed, each)


def _broken_folder_cases(
    original: Path, arguments: list[str], beside: Callable[[Path], None], seed: int, each: int
) -> list[Case]:
    chance = random.Random(seed)
    cases = []
    for file in sorted(path for path in original.iterdir() if path.is_file()):
        content = file.read_bytes()
        kinds: dict[str, bytes | None] = {"removed": None, "a folder": b"\0folder"} | damages(content, chance)
        kinds |= json_damages(content, chance, each) if file.suffix == ".json" else {}
        for what, damaged in kinds.items():

            def prepare(f: Path, n: str = file.name, d: bytes | None = damaged) -> None:
                _damage(original, f / "model", Path(n), d)
                beside(f)

            cases.append(Case(f"{arguments[0]}: {file.name} {what}", arguments, (0, 2), prepare))
    return cases


# --- data ---

ROWS = (
    '{"prompt": "a", "prompt": "b", "answer": "c"}', '{"prompt": "a", "answer": NaN}', '{"prompt": "a"}', "[1]", "3",
    '{"prompt": "a", "answer": 1' + "0" * 5000 + "}", '{"prompt": "\\ud800", "answer": "b"}', "null", "{", "{}",
    '{"prompt": "a\\u0000b", "answer": "b"}', '{"prompt": ["a"], "answer": "b"}', '{"prompt": null, "answer": "b"}',
    '{"prompt": "a", "answer": true}', '{"prompt": "a", "answer": "b", "weight": 0}', '{"text": "a", "label": 1}',
    '{"prompt": "a", "answer": "b", "\\u001b[31m": 1}', '{"messages": {"a": 1}}', '{"messages": [[["a"]]]}',
    '{"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": 3}}]}]}',
    '{"conversations": [{"from": "x", "value": "y"}]}', '{"instruction": "a", "input": [], "output": "b"}',
    '{"prompt": "a", "answer": "b", "history": [["a"]]}', '{"prompt": "a", "answer": "b", "tools": "{{{"}',
    "[" * 100_000, '{"a":' * 10_000 + "1" + "}" * 10_000,
)  # fmt: skip
"""Lines of JSON of which most are no rows."""

TABLES = (
    "prompt,prompt\na,b\n", "prompt,answer\na\n", "prompt,answer\na,b,c\n", 'prompt,answer\n"a,b\n',
    "prompt;answer\na;b\n", ",\n,\n", "prompt,answer\n", "prompt,answer\ra,b\r", "prompt,answer\na\0,b\n",
    "prompt,answer\n" + '"' * 200_001, "prompt,answer\n" + "a" * 200_000 + ",b\n", " prompt , answer \na,b\n",
)  # fmt: skip


def data_cases(base: dict[str, Any], seed: int, each: int) -> list[Case]:
    """A task whose train rows are damaged, in any format and compression, checked."""
    chance = random.Random(seed)
    rows = [{"prompt": f"{chance.randrange(99)}?", "answer": chance.choice("ab")} for _ in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = ("prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows)).encode()
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    whole = {"jsonl": lines, "json": json.dumps(rows).encode(), "csv": table, "parquet": parquet.getvalue()}
    contents = []
    for name, content in whole.items():
        for what, damaged in damages(content, chance).items():
            contents.append((name, what, damaged))
        for what, written in {"UTF-16": "utf-16", "UTF-32": "utf-32", "a byte order mark": "utf-8-sig"}.items():
            contents += [(name, what, content.decode().encode(written))] if name != "parquet" else []
    contents += [("jsonl", row[:80], lines + row.encode() + b"\n") for row in ROWS]
    contents += [("jsonl", f"only {row[:80]}", (row + "\n").encode() * 8) for row in ROWS]
    contents += [("csv", text[:80], text.encode()) for text in TABLES]
    for _ in range(each):
        flipped = bytearray(whole["parquet"])
        flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        contents.append(("parquet", "a byte is another", bytes(flipped)))
    packed = [
        (f"{name}.gz", what, gzip.compress(content, mtime=0)) for name, what, content in contents if name != "parquet"
    ]
    packed += [(name, f"{what}, cut", content[: len(content) // 2]) for name, what, content in packed]
    cases = []
    for name, what, content in contents + packed:

        def prepare(f: Path, n: str = name, c: bytes = content) -> None:
            shutil.copytree(base["stream"]["path"], f / "tasks")
            (f / "tasks" / "red" / "train.json").unlink()
            (f / "tasks" / "red" / f"train.{n}").write_bytes(c)
            _write(f, base | {"stream": {"path": "tasks", "order": ["red"]}}, "", "")

        cases.append(Case(f"check: train.{name}: {what}", ["check", "c.yaml"], (0, 2), prepare))
    return cases


# --- command lines ---

COMMANDS = (
    "run", "sweep", "check", "evaluate", "serve", "report", "compare", "methods", "tuners", "streams", "convert",
    "export", "gate", "replay", "lab tokenizer", "lab tokens", "lab pretrain", "lab experiment", "lab",
)  # fmt: skip
WORDS = (
    "", " ", ".", "..", "/", "-", "--", "-1", "0", "x", "run", "c.yaml", "no.yaml", "/dev/null", "a=b", "=", "=x", "a=",
    "seed=x", "a.b.c=1", ".=1", "..a=1", "model.=x", "--stage", "--stage=-1", "--stage=x",
    "--stage=99999999999999999999",
    "--to", "--to=out", "--output", "--output=", "--host=", "--host=x y", "--port=-1", "--port=99999", "--endpoint=x",
    "--endpoint=http://", "--endpoint=http://[", "--timeout=nan", "--timeout=inf", "--concurrency=0", "--retries=-1",
    "--processes=0", "--processes=x", "--format=x", "--baseline=x", "--published=x", "--max-forgetting=nan",
    "--max-forgetting=inf", "--max-general-loss-increase=x%", "--min-average=1e999", "--help", "--no-such-option", "-o",
    "\x1b[31m", "a\udcffb", "x" * 5000, "ä/你", "../" * 50, "%s", "{}", "[/]", "--junit=/no/x", "--markdown=.", "trace",
    "--metrics", "--dry-run", "--ray=x",
)  # fmt: skip


def command_line_cases(original: Path, base: dict[str, Any], seed: int, count: int) -> list[Case]:
    """Wrong command lines beside a run, a configuration and other files."""
    chance = random.Random(seed)
    cases = []
    for _ in range(count):
        command = chance.choice(COMMANDS).split()
        words = [chance.choice(WORDS) for _ in range(chance.randrange(4))]
        if command[0] in ("demo", "serve", "run", "sweep", "replay") and words == ["c.yaml"]:
            continue

        def prepare(f: Path) -> None:
            shutil.copytree(original / "run", f / "run")
            _write(f, base, "stream.path", "/no/such/folder")

        cases.append(Case(" ".join([*command, *map(repr, words)])[:200], [*command, *words], (0, 2, 3), prepare))
    return cases
