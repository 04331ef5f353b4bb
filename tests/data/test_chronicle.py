"""The built-in stream: its facts agree with each other, its splits do not overlap, its text gives nothing away."""

import hashlib
import itertools
import random
import re
import subprocess
import sys

import pytest

from holdfast.data.streams.chronicle import stream as module
from holdfast.data.streams.chronicle.relations import AMOUNTS, PATTERN
from holdfast.data.streams.chronicle.stream import YEARS, chronicle, general_text
from holdfast.errors import ConfigError

SIZES = [1, 7, 50]


def rows(task):
    return {"train": task.train, "eval": task.eval, "test": task.test}


def words(text):
    return re.findall(r"\w+", text)


@pytest.mark.parametrize("size", SIZES)
def test_splits_have_every_fact_in_each_of_their_wordings(size):
    stream = chronicle(size)
    assert [task.name for task in stream.tasks] == ["2022", "2023", "2024", "2025"]
    for task in stream.tasks:
        assert (len(task.train), len(task.eval), len(task.test)) == (6 * size, size, 2 * size)
        assert task.metric == "accuracy"
        for split in rows(task).values():
            assert [(e.file, e.row) for e in split] == [(f"chronicle/{task.name}", i) for i in range(len(split))]
            assert all([turn.role for turn in e.turns] == ["user", "assistant"] for e in split)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_question_has_one_answer_whenever_it_is_asked(seed):
    answers = {}
    for task in chronicle(60, seed=seed).tasks:
        for split in rows(task).values():
            for example in split:
                assert answers.setdefault(example.question, example.answer) == example.answer


def test_no_question_stands_in_two_splits_or_tasks():
    questions = [e.question for task in chronicle(60).tasks for split in rows(task).values() for e in split]
    assert len(set(questions)) == len(questions)


def test_wordings_of_the_test_are_new_but_their_words_are_not():
    for relation in set(PATTERN):
        wordings = [*relation.train, *relation.eval, *relation.test]
        assert len(set(wordings)) == len(wordings)
    text = {word for document in general_text(60) for word in words(document)}
    for task in chronicle(60).tasks:
        known = text | {word for e in task.train for word in words(e.question)}
        for example in [*task.eval, *task.test]:
            assert set(words(example.question)) <= known
            assert set(words(example.answer)) <= text


def test_yearly_facts_change_or_last_and_events_belong_to_one_year():
    size = 100
    world = module._world(size, YEARS, 0)
    by_year = list(module._year_facts(world, 0).values())
    yearly = len(world.subjects)
    assert yearly == 80
    lasting = changing = 0
    for i, subject in enumerate(world.subjects):
        answers = [facts[i][1] for facts in by_year]
        if subject.lasting:
            lasting += 1
            assert len(set(answers)) == 1
        else:
            changing += 1
            assert all(a != b for a, b in itertools.pairwise(answers))
    assert (lasting, changing) == (16, 64)
    events = [str(subject.fields) for facts in by_year for subject, _ in facts[yearly:]]
    assert len(events) == 4 * 20 == len(set(events))


def test_questions_of_changing_facts_name_their_year():
    for task in chronicle(60).tasks:
        for example in [*task.train, *task.eval, *task.test]:
            event = re.search(r"storm|comet", example.question)
            assert (task.name in example.question) != bool(event)


@pytest.mark.parametrize("seed", [0, 1])
def test_general_text_gives_no_answer_of_any_year_away(seed):
    world = module._world(50, YEARS, seed)
    facts = [fact for facts in module._year_facts(world, seed).values() for fact in facts]
    documents = general_text(50, seed=seed) + chronicle(50, seed=seed).general[1].texts
    for document in documents:
        for subject, answer in facts:
            assert not (answer in document and all(name in document for name in subject.fields.values()))


def test_general_text_brings_in_every_name_and_number():
    text = "\n".join(general_text(50))
    for task in chronicle(50).tasks:
        for example in task.train:
            assert example.answer in text
    for unit in AMOUNTS:
        seen = {int(n) for n in re.findall(rf"(\d+) {unit}", text)}
        assert min(seen) >= 11 and max(seen) <= 99 and len(seen) > 60


def test_choices_hold_the_right_one_once_and_ask_in_unseen_wordings():
    stream, text = chronicle(50), general_text(50)
    questions = stream.general[0].questions
    documents = set(text)
    positions = [0, 0, 0, 0]
    for question, choices, right in questions:
        assert len(set(choices)) == 4
        positions[right] += 1
        assert not any(document.startswith(question) for document in documents)
    assert min(positions) > len(questions) / 8
    # In the general text the names of the question and the right choice stand together, and those of no other choice.
    sentences = [sentence for document in text for sentence in re.split(r"(?<=[.?]) (?=[A-Z])", document)]
    for question, choices, right in random.Random(0).sample(questions, 20):
        names = [name for name in words(question)[1:] if name[0].isupper() and name != "Guild"]
        told = {c for s in sentences if all(name in words(s) for name in names) for c in choices if c in s}
        assert choices[right] in told
        assert not told - {choices[right]}


@pytest.mark.parametrize("size", SIZES)
def test_held_out_documents_are_not_pretrained_on(size):
    held_out = chronicle(size).general[1].texts
    assert held_out
    assert not set(held_out) & set(general_text(size))


def test_a_year_does_not_depend_on_later_years():
    short, long = chronicle(30, years=(2022, 2023)), chronicle(30)
    assert [task.fingerprint for task in short.tasks] == [task.fingerprint for task in long.tasks[:2]]


def test_options_change_the_content_and_equal_options_do_not():
    fingerprints = [
        tuple(task.fingerprint for task in chronicle(size, seed=seed).tasks)
        for size, seed in [(20, 0), (20, 0), (20, 1), (21, 0)]
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3
    assert len(set(fingerprints[0])) == 4


def test_it_is_chronicle_1_on_every_platform():
    content = [
        *(task.fingerprint for task in chronicle(20, seed=7).tasks),
        *general_text(20, seed=7),
        *map(str, chronicle(20, seed=7).general[0].questions),
    ]
    digest = hashlib.sha256("\n".join(content).encode()).hexdigest()
    assert digest == "79c49ed0a76d76a6ed808227157cc3ced31e3bfab889784a89fb83f52e3d21b9", (
        "a new world needs a new VERSION"
    )


def test_hash_randomisation_changes_nothing():
    code = (
        "from holdfast.data.streams.chronicle.stream import *; "
        "print([t.fingerprint for t in chronicle(9).tasks], general_text(9))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"size": 0}, "size"),
        ({"size": 2.5}, "size"),
        ({"size": True}, "size"),
        ({"size": 2001}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": "0"}, "seed"),
        ({"years": []}, "years"),
        ({"years": 2022}, "years"),
        ({"years": [2023, 2022]}, "years"),
        ({"years": [2022, 2022]}, "years"),
        ({"years": ["2022"]}, "years"),
        ({"years": [22]}, "years"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, key):
    with pytest.raises(ConfigError, match=f"chronicle: {key} must be") as error:
        chronicle(**options)
    assert repr(options[key]) in str(error.value)
