"""YAML that is no configuration gets one line, at once; so do values on the command line."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from holdfast.config.reading import read_yaml
from holdfast.config.run import load_config
from holdfast.config.yaml_values import YamlError, parse_yaml
from holdfast.errors import ConfigError

BOMB = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)

REFUSED = {
    "aliases": (BOMB, "line 5: holds more than 100,000 values, with its aliases expanded"),
    "aliases of mappings": (BOMB.replace("[", "{k: [").replace("]", "]}"), "more than 100,000 values"),
    "merged aliases": (
        "x: &x {a: 1}\n" + "".join(f"k{n}: {{<<: [{'*x, ' * 20000}]}}\n" for n in range(9)),
        "more than",
    ),
    "an alias of itself": ("a: &a [1, *a]", "*a stands for a value that it is a part of"),
    "a key twice": ("seed: 1\nmodel: m\nseed: 2\n", "line 3: the key 'seed' stands in line 1 already"),
    "a key twice below": ("t:\n  a: 1\n  b: {c: 1, c: 2}\n", "line 3: the key 'c' stands in line 3 already"),
    "one key in two spellings": ("seed: 1\n'seed': 2\n", "line 2: the key 'seed' stands in line 1 already"),
    "too many digits": ("seed: " + "1" * 5000, "line 1: a number of 5000 digits; 300 at most"),
    "too many hexadecimal digits": ("seed: 0x" + "f" * 5000, "line 1: a number of 5002 digits"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep mappings": ("{a: " * 5000 + "1" + "}" * 5000, "nested too deeply"),
    "half a surrogate": (r'seed: "\ud800"', "the character U+D800 belongs to no text"),
    "a surrogate pair of escapes": (r'"\ud83d\ude00": 1', "the character U+D83D belongs to no text"),
    "the end of a path": (r'output: "a\0b"', "the character U+0000 belongs to no text"),
    "a date that is none": ("a: !!timestamp 2024-13-45", "'2024-13-45' is no timestamp"),
    "a number that is none": ("a: !!int x", "'x' is no int"),
    "a truth that is none": ("a: !!bool perhaps", "'perhaps' is no bool"),
    "an empty number": ("a: !!float ''", "'' is no float"),
    "bytes that are none": ("a: !!binary ä", "failed to convert base64 data into ascii"),
    "an object": ("a: !!python/object:os.system {}", "could not determine a constructor"),
    "a list as a key": ("? [a]\n: 1", "found unhashable key"),
    "two documents": ("a: 1\n---\nb: 2", "but found another document"),
    "an open list": ("a: [1, 2", "is not valid YAML"),
    "a control character": ("a: \x07", "special characters are not allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_with_its_name_and_line(case, tmp_path):
    text, reason = REFUSED[case]
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as told:
        read_yaml(file)
    assert str(told.value).startswith(f"{file}: ") and reason in str(told.value)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed=" + "1" * 5000, "a number of 5000 digits"),
        ("seed=.inf", "seed: must be a finite number, not inf"),
        ("training.learning_rate=.inf", "training.learning_rate: must be a finite number"),
        ("training.learning_rate=1e999", "training.learning_rate: must be a finite number"),
        ("output={a: 1, a: 2}", "the key 'a' stands in line 1 already"),
        ("output=" + "[" * 3000, "is nested too deeply"),
        (r'output="\ud800"', "belongs to no text"),
        ("output=a\udcffb", "belongs to no text"),
        ("output.x=1", "output is not a section"),
        ("a\udcff=1", "belongs to no text"),
    ],
)
def test_an_override_is_refused(override, reason):
    with pytest.raises(ConfigError) as told:
        load_config({"model": "m", "stream": "trace", "output": "o"}, [override])
    assert reason in str(told.value)
    str(told.value).encode()


def test_what_stays_as_it_was():
    text = "a: 3e-4\nb: &b [1, 2]\nc: *b\nd: {<<: {x: 1, y: 2}, x: 3}\n"
    text += "e: 2024-01-02\nf: 2024-13-45\ng: [*b, *b]\nh: 0x10\n"
    values = parse_yaml(text)
    assert values == {
        "a": 3e-4, "b": [1, 2], "c": [1, 2], "d": {"x": 3, "y": 2}, "e": "2024-01-02", "f": "2024-13-45",
        "g": [[1, 2], [1, 2]], "h": 16,
    }  # fmt: skip
    assert not isinstance(values["e"], datetime.date)
    assert parse_yaml("") is None and parse_yaml("[" * 50 + "]" * 50)
    with pytest.raises(YamlError, match="holds more than"):
        parse_yaml("[" + "1," * 100_001 + "]")


def test_a_file_without_an_end_is_not_read_to_it():
    with pytest.raises(ConfigError, match="has more than 10,000,000 bytes"):
        read_yaml(Path("/dev/zero"))
