"""The built-in quiz: its questions, the answers that a rule can tell, how it is named, and when a run has it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from holdfast.api.task import General, Stream
from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.reading import validate
from holdfast.errors import ConfigError
from holdfast.evaluation.abilities import QUIZ, load_general
from holdfast.system.files import read_jsonl

ROWS = read_jsonl(QUIZ)
CATEGORIES = {"knowledge", "language", "arithmetic", "instructions"}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS = {"weeks": 7, "days": 24, "hours": 60, "minutes": 60, "years": 12, "metres": 100}


def of(category: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if row["subject"] == category]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def items(listed: str) -> list[str]:
    return listed.rstrip(".?").split(", ")


SUMS: dict[str, Callable[..., int]] = {
    r"What is (\d+) \+ (\d+)\?": lambda a, b: a + b,
    r"What is (\d+) - (\d+)\?": lambda a, b: a - b,
    r"What is (\d+) times (\d+)\?": lambda a, b: a * b,
    r"What is (\d+) divided by (\d+)\?": lambda a, b: a // b if a % b == 0 else -1,
    r"What is twice (\d+)\?": lambda a: 2 * a,
    r"What is half of (\d+)\?": lambda a: a // 2 if a % 2 == 0 else -1,
    r"Which number comes right after (\d+)\?": lambda a: a + 1,
    r"Which number comes right before (\d+)\?": lambda a: a - 1,
    r"Anna has (\d+) (?:\w+) and gets (\d+) more\. How many \w+ has she now\?": lambda a, b: a + b,
    r"Ben has (\d+) (?:\w+) and gives away (\d+)\. How many \w+ has he left\?": lambda a, b: a - b,
    r"There are (\d+) \w+ with (\d+) eggs each\. How many eggs are there\?": lambda a, b: a * b,
    r"Which number continues the row (\d+), (\d+), (\d+), (\d+)\?": lambda a, b, c, d: d + b - a,
    r"Which is the largest of the numbers (\d+), (\d+), (\d+), (\d+)\?": max,
    r"Which is the smallest of the numbers (\d+), (\d+), (\d+), (\d+)\?": min,
}
"""The answer to a question of arithmetic from its numbers."""

OBEYS: dict[str, Callable[..., bool]] = {
    r"Write the word (\w+) in capital letters\.": lambda c, w: c == w.upper(),
    r"Write the word (\w+) in small letters\.": lambda c, w: c == w.lower(),
    r"Write the word (\w+) twice\.": lambda c, w: c == f"{w} {w}",
    r"Write the word (\w+) three times\.": lambda c, w: c == f"{w} {w} {w}",
    r"Write the word (\w+) without its first letter\.": lambda c, w: c == w[1:],
    r"Write the number (\w+) as a digit\.": lambda c, w: NAMES[int(c)] == w,
    r"Write the number (\d+) as a word\.": lambda c, w: NAMES[int(w)] == c,
    r"Write these words in reverse order: (.+)\.": lambda c, w: c.split() == w.split()[::-1],
    r"What is the first letter of the word (\w+)\?": lambda c, w: c == f'The first letter is "{w[0]}"',
    r"What is the last letter of the word (\w+)\?": lambda c, w: c == f'The last letter is "{w[-1]}"',
    r"How many letters does the word (\w+) have\?": lambda c, w: numbers(c) == [len(w)],
    r"Sort these numbers from small to large: (.+)\.": lambda c, w: numbers(c) == sorted(numbers(w)),
    r"Sort these numbers from large to small: (.+)\.": lambda c, w: numbers(c) == sorted(numbers(w))[::-1],
    r"Put these words in alphabetical order: (.+)\.": lambda c, w: items(c) == sorted(items(w)),
    r"What is the first word in this list: (.+)\?": lambda c, w: c == f"The first word is {items(w)[0]}",
    r"What is the second word in this list: (.+)\?": lambda c, w: c == f"The second word is {items(w)[1]}",
    r"What is the last word in this list: (.+)\?": lambda c, w: c == f"The last word is {items(w)[-1]}",
    r"Count from 1 to (\d)\.": lambda c, n: numbers(c) == list(range(1, int(n) + 1)),
    r"Say the word (\w+) and nothing else\.": lambda c, w: c == w,
    r"Repeat this (?:word|sentence): (.+)\.": lambda c, w: c == w,
    r"Name a word that begins with the letter (\w)\.": lambda c, letter: c.lower().startswith(letter),
    r"Name a word that ends with the letter (\w)\.": lambda c, letter: c.endswith(letter),
    r"End this with an exclamation mark: (.+)": lambda c, s: c == f"{s}!",
    r"Put the word (\w+) in round brackets\.": lambda c, w: c == f"({w})",
    r"Replace (\w+) with (\w+): (.+)\.": lambda c, old, new, s: c == s.replace(old, new),
}
"""Whether a choice does what an instruction says."""


def rule(rules: dict[str, Callable[..., Any]], question: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The one rule for a question, and what it is about."""
    [(found, groups)] = [(rules[form], m.groups()) for form in rules if (m := re.fullmatch(form, question))]
    return found, groups


def general(value: Any) -> list[General]:
    configs = validate(EvaluationConfig, {"general": value}, "run.yaml").general
    return load_general(configs, Stream("s", []))


# --- the questions ---


def test_every_question_has_four_short_choices_and_stands_once() -> None:
    assert 280 <= len(ROWS) <= 320
    assert {row["subject"] for row in ROWS} == CATEGORIES
    for row in ROWS:
        assert set(row) == {"question", "choices", "answer", "subject"}
        assert len(set(row["choices"])) == 4 and all(choice == choice.strip() for choice in row["choices"])
        assert len(row["question"].split()) <= 20 and max(len(choice) for choice in row["choices"]) <= 40
    assert len({row["question"].lower() for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("count", [100, len(ROWS)])
def test_the_first_questions_are_an_even_sample(count: int) -> None:
    whole, first = (Counter(row["subject"] for row in rows) for rows in (ROWS, ROWS[:count]))
    for category in CATEGORIES:
        assert abs(first[category] - whole[category] * count / len(ROWS)) <= 1
    places = Counter(row["answer"] for row in ROWS[:count])
    assert all(abs(places[place] - count / 4) <= 5 for place in range(4))


@pytest.mark.parametrize("row", of("arithmetic"), ids=lambda row: row["question"])
def test_arithmetic_is_right(row: dict[str, Any]) -> None:
    if units := re.fullmatch(r"How many (\w+) are in (\d+) (\w+)\?", row["question"]):
        expected = int(units[2]) * UNITS[units[3]]
    else:
        answer, given = rule(SUMS, row["question"])
        expected = answer(*map(int, given))
    found = [numbers(choice) for choice in row["choices"]]
    assert found[row["answer"]] == [expected] and found.count([expected]) == 1


@pytest.mark.parametrize("row", of("instructions"), ids=lambda row: row["question"])
def test_one_choice_follows_the_instruction(row: dict[str, Any]) -> None:
    obeys, given = rule(OBEYS, row["question"])
    assert [obeys(choice, *given) for choice in row["choices"]].index(True) == row["answer"]
    assert sum(obeys(choice, *given) for choice in row["choices"]) == 1


# --- its name ---


def test_a_name_alone_is_the_quiz_also_among_files(tmp_path) -> None:
    (tmp_path / "wiki.txt").write_text("A text.\n", encoding="utf-8")
    [quiz] = general("everyday")
    assert (quiz.name, quiz.kind, len(quiz.questions)) == ("everyday", "choices", len(ROWS))
    assert quiz.questions[0] == (ROWS[0]["question"], ROWS[0]["choices"], ROWS[0]["answer"])
    both = general(["everyday", {"name": "wiki", "path": str(tmp_path / "wiki.txt")}])
    assert [one.name for one in both] == ["everyday", "wiki"]
    [some] = general([{"name": "everyday", "rows": 100}])
    assert some.questions == quiz.questions[:100]
    [lettered] = general([{"name": "everyday", "by": "letter"}])
    assert lettered.questions[0][1] == ["A", "B", "C", "D"]


def test_a_file_may_have_the_name_of_the_quiz(tmp_path) -> None:
    (tmp_path / "own.txt").write_text("A text.\n", encoding="utf-8")
    [own] = general([{"name": "everyday", "path": str(tmp_path / "own.txt")}])
    assert own.texts == ["A text."]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("everday", "general: there is no built-in measure 'everday'; did you mean 'everyday'?"),
        (["wiki"], "general.0: there is no built-in measure 'wiki'; known: everyday; a file of your own is written"),
        ([{"name": "wiki"}], "general.0: path: is required but absent"),
        ([{"name": "everyday", "kind": "perplexity"}], "general.0: path: is required but absent"),
    ],
)
def test_another_name_is_refused(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"run.yaml: {said}")):
        general(value)


def test_what_is_recorded_of_it_reads_the_same() -> None:
    config = EvaluationConfig.model_validate({"general": ["everyday", {"name": "wiki", "path": "wiki.txt"}]})
    assert EvaluationConfig.model_validate(config.model_dump(mode="json")) == config
