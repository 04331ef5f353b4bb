"""Bad input, made from a seed: wrong values, damaged runs, broken models, wrong command lines, and what became of them.

Each case is a command line in a folder of its own. It must end with a message or a result, soon, and never with a
traceback; where the input cannot mean what it says, it must be refused.
"""

from __future__ import annotations

import contextlib
import copy
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

import yaml

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
