"""Test time: parts of several methods nest, every row is answered once, in its place, and an error undoes all."""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext

import pytest
import torch

from holdfast.api.method import Method
from holdfast.api.rows import prompt
from holdfast.api.task import Example, Task, Turn
from holdfast.data.encode import Encoder
from holdfast.engines.vectors import borrowed
from holdfast.evaluation import respond
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.respond import evaluate_task
from holdfast.models.generation import generate
from support.tiny import tiny_model, tiny_tokenizer

LETTERS = "abcdefghij"


def task(metric="accuracy", count=9):
    chance = random.Random(metric)
    rows = []
    for row in range(count):
        question = "".join(chance.choices(LETTERS, k=chance.randrange(2, 9)))
        rows.append(Example("test.json", row, (Turn("user", question), Turn("assistant", question[0]))))
    return Task("letters", metric, train=rows, test=rows)


def evaluation(*methods, model=None, batch_size=4):
    encoder = Encoder(tiny_tokenizer(), max_length=64)
    return ModelEvaluation(model or tiny_model(), encoder, batch_size, list(methods))


class Moving(Method):
    """Adds its number to the model's weights, for a part of the rows at a time."""

    def __init__(self, name, sizes, shift=0.0):
        self.name, self.sizes, self.shift = name, sizes, shift
        self.log = []

    @contextmanager
    def moved(self, model):
        with borrowed(model) as theta:
            self.log.append("in")
            for t in theta:
                t.add_(self.shift)
            try:
                yield
            finally:
                self.log.append("out")

    def at_test(self, evaluation, rows):
        left = list(range(len(rows)))
        random.Random(len(rows)).shuffle(left)
        for size in self.sizes * len(rows):
            part, left = left[:size], left[size:]
            if not part:
                return
            with self.moved(evaluation.model):
                self.log.append([tuple(rows[i]["input_ids"]) for i in part])
                yield part


class Idle(Method):
    def __init__(self):
        pass


def asked(log):
    return [row for entry in log if isinstance(entry, list) for row in entry]


def test_parts_of_two_methods_nest_and_every_row_comes_once():
    outer, inner = Moving("outer", [5, 2]), Moving("inner", [1, 2])
    rows = [{"input_ids": [10 + i, 5]} for i in range(12)]
    parts = list(evaluation(outer, inner).parts(rows))
    assert sorted(i for part in parts for i in part) == list(range(12))
    assert [len(part) for part in parts] == [1, 2, 1, 1, 1, 1, 1, 2, 1, 1]  # of 5, 2 and 5 rows
    assert sorted(asked(outer.log)) == sorted(asked(inner.log)) == sorted(tuple(row["input_ids"]) for row in rows)
    # While an outer part lasts, the inner method sees its rows only.
    flat = [tuple(rows[i]["input_ids"]) for part in parts for i in part]
    for entry in (entry for entry in outer.log if isinstance(entry, list)):
        assert sorted(flat[: len(entry)]) == sorted(entry)
        flat = flat[len(entry) :]


def test_without_methods_or_with_ones_that_do_nothing_all_rows_are_one_part():
    rows = [{"input_ids": [3, 4]}] * 3
    assert list(evaluation().parts(rows)) == [[0, 1, 2]]
    assert list(evaluation(Moving("one", [9]), Moving("two", [9])).parts(rows)) != []
    assert list(evaluation(Idle()).parts(rows)) == [[0, 1, 2]]
    assert list(evaluation().parts([])) == [[]]


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_each_row_is_answered_by_the_model_as_it_is_for_that_row_and_stands_in_its_place(metric):
    """Against a plain loop: a method that moves the weights for every second row."""

    class EverySecond(Moving):
        def at_test(self, evaluation, rows):
            yield [i for i, row in enumerate(rows) if sum(prompt(row)) % 2]
            with self.moved(evaluation.model):
                yield [i for i, row in enumerate(rows) if not sum(prompt(row)) % 2]

    letters, model = task(metric), tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    method = EverySecond("second", [], shift=0.02)
    found = evaluate_task(evaluation(method, model=model), letters, max_new_tokens=4)
    assert [record["row"] for record in found] == [example.row for example in letters.test]
    both = set()
    encoder = Encoder(tiny_tokenizer(), max_length=64)
    for record, example in zip(found, letters.test, strict=True):
        ids = encoder.prompt(example, reserve=4)
        odd = bool(sum(ids) % 2)
        both.add(odd)
        alone = Task("one", metric, train=letters.train, test=[example])
        with nullcontext() if odd else method.moved(model):
            [expected] = evaluate_task(evaluation(model=model), alone, max_new_tokens=4)
        if metric == "loss":
            assert record["score"] == pytest.approx(expected["score"], rel=1e-5)
        else:
            assert record == expected
    assert both == {True, False}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_an_error_closes_every_method_at_once(metric):
    """The test holds the traceback, so only closing can have restored the weights."""
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    outer, inner = Moving("outer", [5], shift=0.1), Moving("inner", [2], shift=0.2)

    def stop(done, total):
        assert not torch.equal(before["model.norm.weight"], model.model.norm.weight)
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:
        evaluate_task(evaluation(outer, inner, model=model), task(metric), max_new_tokens=2, on_batch=stop)
    assert held.tb is not None
    for method in (outer, inner):
        assert method.log.count("in") == method.log.count("out") > 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_method_that_fails_closes_those_around_it():
    class Failing(Moving):
        def at_test(self, evaluation, rows):
            yield from super().at_test(evaluation, rows[:1])
            raise ValueError("cannot")

    outer, inner = Moving("outer", [3]), Failing("inner", [1])
    with pytest.raises(ValueError, match="cannot") as held:
        list(evaluation(outer, inner).parts([{"input_ids": [3, 4]}] * 5))
    assert held.tb is not None
    assert outer.log.count("in") == outer.log.count("out") == 1


def test_progress_counts_all_rows(monkeypatch):
    seen = []
    evaluate_task(
        evaluation(Moving("one", [4]), batch_size=3),
        task(),
        max_new_tokens=2,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 9), (4, 9), (7, 9), (8, 9), (9, 9)]


def test_what_a_method_asks_instead_is_what_the_model_sees_and_methods_are_asked_in_order(monkeypatch):
    """Each puts a turn in front, where it fits; the record still tells the example's own prompt."""

    class Before(Method):
        def __init__(self, name, text):
            self.name, self.text = name, text

        def ask(self, evaluation, task, example, fits):
            longer = Example(
                example.file, example.row, (Turn("user", self.text), Turn("assistant", "a"), *example.turns)
            )
            return longer if fits(longer) else example

    seen = []

    def spy(model, prompts, **options):
        seen.extend(prompts)
        return generate(model, prompts, **options)

    monkeypatch.setattr(respond, "generate", spy)
    letters = task(count=3)
    this = evaluation(Before("one", "one"), Before("long", "x" * 60), Before("two", "two"))
    records = evaluate_task(this, letters, max_new_tokens=2)
    for tokens, example, record in zip(seen, letters.test, records, strict=True):
        text = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
        assert text.index("two") < text.index("one") < text.index(example.question) and "x" not in text
        assert record["prompt"] == example.question


def test_the_prompt_is_what_stands_before_the_answer():
    assert prompt({"input_ids": [1, 5, 6, 7]}) == [1, 5, 6, 7]
    assert prompt({"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}) == [1, 5]
    assert prompt({"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}) == [1, 5, 6, 7]  # a text
    assert prompt({"input_ids": [5, 6], "labels": [5, 6]}) == [5, 6]


def test_rows_are_collated_for_the_model():
    batch = evaluation().collate([{"input_ids": [4, 5, 6]}, {"input_ids": [7, 8], "labels": [-100, 8]}])
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100] * 3, [-100, 8, -100]]
