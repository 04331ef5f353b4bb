"""Metrics of answers about pictures, against the authors' formulas by brute force and values of their code."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from holdfast.api.task import Example, Turn
from holdfast.config.evaluation import EvaluationConfig
from holdfast.errors import ConfigError
from holdfast.metrics.intervals import intervals
from holdfast.scoring import SCORERS, build
from holdfast.scoring.boxes import box
from holdfast.scoring.score import beside_score
from holdfast.scoring.vqa import normalized

# --- VQA accuracy ---


def score(metric: str, response: str, *right: str) -> float:
    return SCORERS[metric].row({"response": response, "answer": right[0], "answers": list(right)})


@pytest.mark.parametrize("metric", ["vqa_accuracy", "textvqa_accuracy"])
@pytest.mark.parametrize("people", [2, 3, 5, 10, 11])
def test_vqa_accuracy_is_the_mean_over_all_subsets_that_leave_one_out(metric, people):
    for agree in range(people + 1):
        right = ["red"] * agree + ["blue", "green"] * people
        right = right[:people]
        subsets = list(combinations(right, people - 1))
        expected = sum(min(1, subset.count("red") / 3) for subset in subsets) / len(subsets)
        assert score(metric, "red", *right) == pytest.approx(expected), agree


def test_of_ten_people_four_are_enough():
    given = [score("vqa_accuracy", "red", *["red"] * n, *["blue"] * (10 - n)) for n in range(6)]
    assert given == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # made by the code of the authors of VQA
        ("The Two dogs.", "2 dogs"),
        ("an apple", "apple"),
        ("None", "0"),
        ("1,000 (at least)", "1000 at least"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("5 - 6 t-shirts", "5 6 tshirts"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        (".5 miles.", ".5 miles"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("ow's'at", "'ow's'at"),
        ("yall'd've", "y'all'd've"),
        ("let's", "let's"),
        ("Im", "im"),
        ("what?", "what"),
        ("eleven", "eleven"),
        ("a an the", ""),
    ],
)
def test_answers_are_normalised_as_the_authors_do(text, expected):
    assert normalized(text) == expected


def test_people_who_all_say_the_same_are_compared_as_they_stand():
    assert score("vqa_accuracy", "Yes", *["yes"] * 10) == 0
    assert score("vqa_accuracy", " yes\n", *["yes"] * 10) == 1
    assert score("vqa_accuracy", "Yes", *["yes"] * 9, "yeah") == 1
    assert score("textvqa_accuracy", "Yes", *["yes"] * 10) == 1


def test_textvqa_has_a_normalisation_of_its_own():
    people = ["dog's bowl"] * 9 + ["bowl"]
    assert score("textvqa_accuracy", "dog 's bowl", *people) == 1
    assert score("vqa_accuracy", "dog 's bowl", *people) == 0
    assert score("textvqa_accuracy", "1,5", *["15"] * 9, "16") == 1


@pytest.mark.parametrize("metric", ["vqa_accuracy", "textvqa_accuracy", "upper_case_match"])
def test_a_single_answer_is_matched_in_upper_case(metric):
    assert score(metric, " Yes\n", "yes") == 1
    assert score(metric, "yes.", "yes") == 0
    assert score(metric, "the dog", "dog") == 0


# --- the rules of CoIN, GQA and MLLM-CL ---


@pytest.mark.parametrize(
    ("metric", "response", "answer", "expected"),
    [  # made by their code, but for the empty response
        ("coin_choice_letter", "B", "B", 1),
        ("coin_choice_letter", "B. dogs", "B", 1),
        ("coin_choice_letter", "The answer is (b)", "B", 1),
        ("coin_choice_letter", "a dog, so B", "B", 0),
        ("coin_choice_letter", "Because", "B", 0),
        ("coin_choice_letter", "", "B", 0),
        ("coin_either_contains", "a tabby cat", "tabby cat", 1),
        ("coin_either_contains", "cat", "tabby cat", 1),
        ("coin_either_contains", "Cat", "tabby cat", 0),
        ("coin_either_contains", "", "tabby cat", 0),
        ("gqa_exact_match", "Red.", "red", 1),
        ("gqa_exact_match", "the red", "red", 0),
        ("mllm_cl_contains", "It is red, yes", "Red.", 1),
        ("mllm_cl_contains", "It is reddish", "red", 1),
        ("mllm_cl_contains", "altered states", "red", 1),
        ("mllm_cl_contains", "infrared-blue sky", "red", 0),
        ("mllm_cl_contains", "infrared", "red", 1),
        ("mllm_cl_contains", "3.5", "3.5", 0),
        ("mllm_cl_contains", "turn left now", "turn left", 1),
        ("mllm_cl_contains", "Unanswerable, red", "red", 0),
        ("mllm_cl_answer_within", "infrared-blue sky", "Red", 1),
        ("mllm_cl_answer_within", "Unanswerable, red", "red", 0),
        ("mllm_cl_choice", " Yes . ", "yes", 1),
        ("mllm_cl_choice", "Yes, it is", "yes", 0),
        ("mllm_cl_choice", "C.", "C", 1),
        ("upper_case_match", "Two Dogs", "two dogs", 1),
        ("upper_case_match", "two dogs.", "two dogs", 0),
    ],
)
def test_answers_are_compared_as_the_sources_code_does(metric, response, answer, expected):
    assert score(metric, response, answer) == expected


@pytest.mark.parametrize(
    ("picture", "prompt", "response", "answer", "expected"),
    [  # made by their code
        ("images/AI2D_7.png", "What is it?", "A Leaf", "a leaf", 1),
        ("images/SciVerse_7.png", "What is it?", "it is a leaf", "leaf", 0),
        ("images/MapQA_7.png", "Is it high?", "Yes, it is", "yes", 1),
        ("images/MapQA_7.png", "Which states are high?", "Ohio,Iowa,Utah", "ohio,iowa,maine,texas", 0.5),
        ("images/MapQA_7.png", "Which states are high?", "ohio, iowa", "ohio,iowa", 0.5),
        ("images/MapQA_7.png", "Which states are high?", "Unanswerable,ohio", "ohio", 0),
    ],
)
def test_science_is_compared_by_where_its_picture_is_from(picture, prompt, response, answer, expected):
    record = {"response": response, "answer": answer, "prompt": prompt, "pictures": [picture]}
    assert SCORERS["mllm_cl_science"].row(record) == expected


# --- ANLS ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [  # the example of DocVQA's organisers: Coca Cola, or Coca Cola Company
        ("The Coca", 0),
        ("CocaCola", 1 - 1 / 9),
        (" Coca  cola ", 1),
        ("Cola", 0),
        ("Cat", 0),
        ("", 0),
    ],
)
def test_anls_of_the_best_right_answer(response, expected):
    assert score("anls", response, "Coca Cola", "Coca Cola Company") == pytest.approx(expected)


def test_a_text_of_which_half_is_edited_scores_nothing():
    assert score("anls", "abxx", "abcd") == 0
    assert score("anls", "abcxx", "abcde") == pytest.approx(0.6)


def distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_anls_by_brute_force():
    rng = random.Random(0)
    for _ in range(100):
        a, b = ("".join(rng.choices("abC", k=rng.randint(1, 5))) for _ in range(2))
        share = distance(a.lower(), b.lower()) / max(len(a), len(b))
        assert score("anls", a, b) == pytest.approx(1 - share if share < 0.5 else 0)


# --- boxes ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.1, 0.2, 0.5, 0.9]", (0.1, 0.2, 0.5, 0.9)),
        ("It is at [0.10,0.20,.5,1].", (0.1, 0.2, 0.5, 1)),
        ("<box>(12,30),(400,520)</box>", (12, 30, 400, 520)),
        ("[[12, 30], [400, 520]]", (12, 30, 400, 520)),
        ('{"bbox_2d": [12, 30, 400, 520], "label": "dog"}', (12, 30, 400, 520)),
        ("{<12><30><400><520>}", None),
        ("(12 30 400 520)", (12, 30, 400, 520)),
        (" 12, 30, 400, 520\n", (12, 30, 400, 520)),
        ("[1, 2, 3, 4], [5, 6, 7, 8]", (1, 2, 3, 4)),
        ("[1, 2, 3, 4, 5]", None),
        ("[1, 2, 3]", None),
        ("between 1, 2, 3, 4 dogs", None),
        ("no dog", None),
        ("", None),
    ],
)
def test_the_box_that_a_text_names(text, expected):
    assert box(text) == expected


def test_intersection_over_union_by_counting_pixels():
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        boxes = []
        for _ in range(2):
            (x1, x2), (y1, y2) = (sorted(rng.sample(range(12), 2)) for _ in range(2))
            boxes.append((x1, y1, x2, y2))
        a, b = ({(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in boxes)
        expected = len(a & b) / len(a | b)
        scale = rng.choice([1, 1 / 12, 1000 / 12])
        response, answer = (str([value * scale for value in b]) for b in boxes)
        assert score("iou", response, answer) == pytest.approx(expected)
        assert score("iou_accuracy", response, answer) == (expected > 0.5) or expected == 0.5
        seen.add(expected > 0.5)
    assert seen == {False, True}


def test_half_an_overlap_is_not_enough_and_a_box_without_area_overlaps_with_nothing():
    assert score("iou", "[0, 0, 1, 1]", "[0, 0, 1, 2]") == 0.5
    assert score("iou_accuracy", "[0, 0, 1, 1]", "[0, 0, 1, 2]") == 0
    assert score("iou", "[0, 0, 0, 0]", "[0, 0, 0, 0]") == 0
    assert score("iou", "[5, 5, 1, 1]", "[1, 1, 5, 5]") == 0
    assert score("iou", "the left one", "[1, 1, 5, 5]") == 0
    assert score("iou", "[1, 1, 5, 5]", "[9, 9, 10, 10]", "[1, 1, 5, 5]") == 1  # the best of several


def test_coin_loses_the_last_digit_and_reads_nothing_beside_a_box():
    answer = "[0.0, 0.0, 0.5, 0.29]"
    assert score("coin_iou_accuracy", answer, answer) == 1
    assert score("coin_iou_accuracy", "[0.0, 0.0, 0.5, 1]", "[0.0, 0.0, 0.5, 1]") == 0  # "0.0, 0.0, 0.5, "
    assert score("coin_iou_accuracy", "[0.10, 0.10, 0.20, 0.15]", "[0.10, 0.10, 0.20, 0.15]") == 0  # down to 0.1
    assert score("iou_accuracy", "[0.10, 0.10, 0.20, 0.15]", "[0.10, 0.10, 0.20, 0.15]") == 1
    assert score("coin_iou_accuracy", f"It is at {answer}", answer) == 0
    assert score("coin_iou_accuracy", "no", answer) == 0


@pytest.mark.parametrize("metric", ["iou", "iou_accuracy", "coin_iou_accuracy"])
def test_an_answer_without_a_box_is_refused(metric):
    def asked(answer: str) -> Example:
        return Example("a.json", 0, (Turn("user", "Where is the dog?"), Turn("assistant", answer)))

    assert SCORERS[metric].refusal(asked("[0, 0, 1, 1]"), None) is None
    assert "'on the left' names no box" in str(SCORERS[metric].refusal(asked("on the left"), None))


# --- CIDEr ---

CAPTIONS = [
    ("A dog runs on the beach.", ["A dog is running on the beach.", "The brown dog runs along a beach"]),
    ("a cat", ["A cat sits on a red sofa.", "Cat on the sofa, asleep"]),
    ("Two men ride on horses", ["Two men riding horses", "Two people on the backs of horses.", "Men on horses"]),
    ("", ["A red bus"]),
    ("a red bus a red bus a red bus", ["A red bus drives by", "The bus is red"]),
]


def captions() -> list[dict[str, Any]]:
    return [{"response": r, "answer": people[0], "answers": people} for r, people in CAPTIONS]


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.lower().replace(".", "").replace(",", "").split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(number: int) -> float:
    """CIDEr-D of a row as the paper has it: 10 / 4 of the sum over n of the mean over people of the Gaussian of the
    difference in length times a clipped cosine."""
    response, people = CAPTIONS[number]
    total = 0.0
    for n in range(1, 5):
        rows = [set().union(*(grams(person, n) for person in row)) for _, row in CAPTIONS]
        weight = {gram: math.log(len(rows) / sum(gram in row for row in rows)) for row in rows for gram in row}

        def vector(text: str, n: int = n, weight: Any = weight) -> dict[tuple[str, ...], float]:
            return {gram: count * weight.get(gram, math.log(len(CAPTIONS))) for gram, count in grams(text, n).items()}

        for person in people:
            a, b = vector(response), vector(person)
            dot = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
            norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
            longer = sum(grams(response, 2).values()) - sum(grams(person, 2).values())
            total += (dot / norms if norms else 0.0) * math.exp(-(longer**2) / 72) / len(people)
    return 10 * total / 4


def test_cider_by_brute_force():
    pytest.importorskip("pycocoevalcap", reason="pip install 'holdfast[images]'")
    scores = SCORERS["cider"].rows(captions())
    assert scores == pytest.approx([cider_d(number) for number in range(len(CAPTIONS))])
    assert scores[3] == 0 and scores[2] > 1
    assert SCORERS["cider"].rows([]) == []


def test_ciders_weights_stay_when_rows_are_drawn():
    pytest.importorskip("pycocoevalcap", reason="pip install 'holdfast[images]'")
    cider = SCORERS["cider"]
    scores = cider.rows(captions())
    records = [record | {"score": score} for record, score in zip(captions(), scores, strict=True)]
    assert cider.corpus(records) == pytest.approx(np.mean(scores))
    rows = [[None], [cider.statistics(records)]]
    drawn = intervals(rows, totals=[cider.total], resamples=300)["average"]
    assert drawn == pytest.approx(intervals([[None], [scores]], resamples=300)["average"])
    # records of an older run, without this metric, are scored among each other
    assert beside_score(captions(), "cider") == pytest.approx(np.mean(scores))


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # made by the tokenizer of COCO's evaluation
        ("A man's dog isn't (really) black-and-white.", "a man 's dog is n't -lrb- really -rrb- black-and-white"),
        ("Two people, one in red; the other: blue!", "two people one in red the other blue"),
        ("Coca-Cola bottle costs $1.50 and/or 3% off", "coca-cola bottle costs $ 1.50 and/or 3 % off"),
        ("A sign says STOP. A car waits.", "a sign says stop a car waits"),
        ("“hi” he said", "hi he said"),
        ("a bottle of  shampoo , head & shoulders...", "a bottle of shampoo head & shoulders"),
    ],
)
def test_words_are_those_of_cocos_evaluation(caption, words):
    from holdfast.scoring.captions import _words

    assert _words(caption) == words


def test_cider_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ConfigError, match=r"metric cider: needs pycocoevalcap; pip install 'holdfast\[images\]'"):
        build("cider", EvaluationConfig())
