"""Questions of LLM-Adapters' sets: names and texts of the answers, told from the instruction."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.data.choices import by_letter, read_choices
from holdfast.errors import DataError
from support.paths import SHARED

ARC = "Please choose the correct answer to the question: "
PIQA = "Please choose the correct solution to the question: "
HELLASWAG = "Please choose the correct ending to complete the given sentence: "
WINOGRANDE = "Please choose the correct answer to fill in the blank to complete the given sentence: "
BOOLQ = "Please answer the following question with true or false, question: "


def adapters(instruction: str, answer: str, **more: str) -> dict[str, Any]:
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    } | more


LAYOUTS = [
    (  # ARC, OpenBookQA
        adapters(
            f"{ARC}What is hot: ice or fire?\n\nAnswer1: ice Answer2: Fire: hot. Answer3: no\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer2",
        ),
        ("What is hot: ice or fire?", ["ice", "Fire: hot.", "no"], 1),
    ),
    (  # SIQA
        adapters(
            f"{ARC}Robin cut it. What comes next?\n\nAnswer1: eat Answer2: sleep\n\nAnswer format: answer1/answer2",
            "answer1",
        ),
        ("Robin cut it. What comes next?", ["eat", "sleep"], 0),
    ),
    (  # PIQA
        adapters(
            f"{PIQA}baskets\n\nSolution1: hold balls  \n\nSolution2: hold water \n\nAnswer format: solution1/solution2",
            "solution1",
        ),
        ("baskets", ["hold balls", "hold water"], 0),
    ),
    (  # HellaSwag
        adapters(
            f"{HELLASWAG}Drums: [header] A man\n\nEnding1: [step] plays. Ending2: eats Ending3: is Ending4: has\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "ending4",
        ),
        ("Drums: [header] A man", ["[step] plays.", "eats", "is", "has"], 3),
    ),
    (  # WinoGrande
        adapters(
            f"{WINOGRANDE}The jeans fit, so I tried the _ on.\n\nOption1: jeans Option2: shirt "
            "Answer format: option1/option2",
            "option2",
        ),
        ("The jeans fit, so I tried the", ["jeans on.", "shirt on."], 1),
    ),
    (  # BoolQ
        adapters(f"{BOOLQ}is it so?\n\nAnswer format: true/false", "false"),
        ("is it so?", ["true", "false"], 1),
    ),
    (  # with an input, without a request
        adapters("Which?\n\nA1: one A2: two\n\nAnswer format: a1/a2", "a2", input="the text"),
        ("Which?\nthe text", ["one", "two"], 1),
    ),
]


@pytest.mark.parametrize(("row", "expected"), LAYOUTS)
def test_the_texts_of_the_answers_stand_in_the_instruction(row: dict[str, Any], expected: Any):
    assert read_choices(row, "row 1", "texts") == expected


@pytest.mark.parametrize(("row", "expected"), LAYOUTS)
def test_the_names_follow_the_whole_instruction(row: dict[str, Any], expected: Any):
    question, choices, right = read_choices(row, "row 1")
    assert question.startswith(row["instruction"]) and choices[right] == row["answer"]
    assert (len(choices), right) == (len(expected[1]), expected[2])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            adapters(f"{ARC}Why?\n\nAnswer1: a\n\nAnswer format: answer1/answer2", "answer1"),
            "must hold answer1:, answer2:",
        ),
        (
            adapters(f"{ARC}Why?\n\nAnswer2: a Answer1: b\n\nAnswer format: answer1/answer2", "answer1"),
            "once each and in this order",
        ),
        (
            adapters(f"{ARC}Answer1: Why?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer1"),
            "not Answer1:, Answer1:, Answer2:",
        ),
        (
            adapters(f"{WINOGRANDE}_ is hot.\n\nOption1: a Option2: b Answer format: option1/option2", "option1"),
            "must have one blank",
        ),
        (
            adapters(f"{WINOGRANDE}It is hot.\n\nOption1: a Option2: b Answer format: option1/option2", "option1"),
            "must have one blank",
        ),
        (
            adapters(f"{ARC}Why?\n\nAnswer1: a Answer2:\n\nAnswer format: answer1/answer2", "answer2"),
            "must be at least two texts",
        ),
        (adapters(f"{ARC}\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer2"), "must be text"),
        (adapters(f"{ARC}Why?", "answer2"), "must end with the answers"),
        ({"question": "Why?", "choices": ["a", "b"], "answer": 0}, "choices: are texts already"),
        ({"ctx": "Why?", "endings": ["a", "b"], "label": 0}, "endings: are texts already"),
    ],
)
def test_texts_that_cannot_be_told_are_refused_by_row(row: dict[str, Any], said: str):
    with pytest.raises(DataError, match=f"^row 1: .*{said}"):
        read_choices(row, "row 1", "texts")


def test_texts_are_asked_by_letter(tmp_path):
    row, (question, [ice, fire, none], right) = LAYOUTS[0]
    [found], [[heading]] = by_letter([row], [read_choices(row, "1", "texts")], [], [], 0, tmp_path, None, "texts")
    assert found == (f"{question}\nA. {ice}\nB. {fire}\nC. {none}\nAnswer:", ["A", "B", "C"], right)
    assert heading == "The following are multiple choice questions (with answers).\n\n"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
@pytest.mark.parametrize("name", ["ARC-Easy", "boolq"])
def test_real_rows(name: str):
    from holdfast.data.files import read_rows

    for row in read_rows(SHARED / "data" / "multiple_choice" / name / "test.jsonl"):
        question, choices, right = read_choices(row, name, "texts")
        named = read_choices(row, name)
        assert question in row["instruction"] and "Answer" not in question and not question.startswith("Please")
        assert (len(choices), right) == (len(named[1]), named[2])
        assert all(choice in row["instruction"] for choice in choices)
