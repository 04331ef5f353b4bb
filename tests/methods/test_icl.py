"""In-context learning: where the demonstrations come from, how they are rendered, and what stays as it was."""

from __future__ import annotations

import json
import random

import pytest

from holdfast import run
from holdfast.api.task import Example, Task, Turn
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError
from holdfast.evaluation import respond
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.methods import build
from holdfast.methods.icl import InContext
from support.tiny import tiny_config, tiny_tokenizer

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def example(prompt, answer, row=0, file="train.json", system=None):
    first = (Turn("system", system),) if system else ()
    turns = (*first, Turn("user", prompt, cut=(0, len(prompt))), Turn("assistant", answer))
    return Example(file, row, turns)


def letters(count, chance, low=2, high=12):
    return ["".join(chance.choice("abcdefgh") for _ in range(chance.randrange(low, high))) for _ in range(count)]


def some_task(train=30, test=20, seed=0, **length):
    chance = random.Random(seed)
    prompts = letters(train + test, chance, **length)
    rows = [example(prompt, prompt[0]) for prompt in prompts[:train]]
    tests = [example(prompt, prompt[0], i, "test.json") for i, prompt in enumerate(prompts[train:])]
    return Task("letters", "accuracy", rows, tests)


def evaluation(max_length=128, seed=0, template=None, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    method = InContext(**options)
    return ModelEvaluation(None, Encoder(tokenizer, max_length=max_length), batch_size=4, methods=[method], seed=seed)


def question(one):
    return [(turn.role, turn.content) for turn in one.turns[:-1]]


def shown(asked, tested):
    """The demonstrations in a one-turn task's asked example, as (prompt, answer)."""
    said = [turn.content for turn in asked.turns]
    assert said[-2:] == [turn.content for turn in tested.turns]
    return list(zip(said[:-2:2], said[1:-2:2], strict=True))


def test_demonstrations_are_train_rows_with_their_own_answers_and_never_the_test_row():
    task = some_task()
    # Every test prompt stands in train too, with another answer, so that a leak would show; and train repeats itself.
    task.train += [example(question(one)[0][1], "z") for one in task.test] + task.train[:20]
    known = {(one.turns[0].content, one.turns[1].content) for one in task.train}
    drawn_at_all = set()
    for tested in task.test:
        asked = evaluation().ask(task, tested, reserve=4)
        found = shown(asked, tested)
        assert len(found) == 6 and len(set(found)) == 6
        assert set(found) <= known
        assert tested.turns[0].content not in [prompt for prompt, _ in found]
        assert asked.turns[-2:] == tested.turns and (asked.file, asked.row) == (tested.file, tested.row)
        drawn_at_all |= set(found)
    assert len(drawn_at_all) > 30  # anew for each row, from all over the split


def test_nothing_of_the_test_split_decides_what_is_shown():
    task, other = some_task(), some_task()
    other.test = [example("hhhh", "h", one.row, "test.json") for one in other.test]
    for one, two in zip(task.test, other.test, strict=True):
        assert shown(evaluation().ask(task, one, 4), one) == shown(evaluation().ask(other, two, 4), two)


def test_the_choice_repeats_and_follows_the_seed():
    task = some_task()
    first, again, other = ([evaluation(seed=seed).ask(task, tested, 4) for tested in task.test] for seed in (0, 0, 1))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_every_train_row_is_as_likely_as_any_other():
    task = some_task(train=12, test=1)
    assert len({one.turns[0].content for one in task.train}) == 12
    counts = dict.fromkeys((one.turns[0].content for one in task.train), 0)
    for row in range(1000):
        asked = evaluation(shots=3, max_length=10**6).ask(task, example("zz", "z", row), 4)
        for prompt, _ in shown(asked, example("zz", "z")):
            counts[prompt] += 1
    assert all(abs(count / 1000 - 3 / 12) < 0.06 for count in counts.values())


def test_a_small_train_split_is_shown_whole():
    task = some_task(train=3)
    assert sorted(shown(evaluation().ask(task, task.test[0], 4), task.test[0])) == sorted(
        (one.turns[0].content, one.turns[1].content) for one in task.train
    )


def test_plain_rendering_is_that_of_a_conversation():
    task = Task("t", "accuracy", [example("ab", "a"), example("cd", "c")], [example("ef", "e")])
    found = evaluation(shots=2)
    asked = found.ask(task, task.test[0], 4)
    order = [prompt for prompt, _ in shown(asked, task.test[0])]
    assert sorted(order) == ["ab", "cd"]
    text = found.encoder.tokenizer.decode(found.encoder.prompt(asked, 4))
    assert text == "".join(f"{prompt} {prompt[0]}</s>\n" for prompt in order) + "ef"


def test_chat_rendering_is_the_templates_with_the_system_turn_first():
    task = Task("t", "accuracy", [example("ab", "a", system="say")], [example("ef", "e", system="say")])
    found = evaluation(template=CHAT)
    asked = found.ask(task, task.test[0], 4)
    assert [turn.role for turn in asked.turns] == ["system", "user", "assistant", "user", "assistant"]
    said = [{"role": turn.role, "content": turn.content} for turn in asked.turns[:-1]]
    expected = found.encoder.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert found.encoder.prompt(asked, 4) == expected


@pytest.mark.parametrize(("template", "longest"), [(None, 90), (CHAT, 180)])
def test_as_many_as_fit_with_nothing_cut(template, longest):
    task = some_task(test=40, low=4, high=30)
    numbers = set()
    for tested in task.test:
        found = evaluation(max_length=longest, template=template)
        everything = evaluation(max_length=10**6, template=template).ask(task, tested, reserve=4)
        asked = found.ask(task, tested, reserve=4)
        # by hand: each of the six in turn, if the whole prompt then leaves four tokens free
        kept = ()
        for i in range(0, 12, 2):
            longer = kept + everything.turns[i : i + 2]
            said = Example("x", 0, longer + tested.turns)
            if len(evaluation(max_length=10**6, template=template).encoder.prompt(said, 4)) <= longest - 4:
                kept = longer
        assert asked.turns == kept + tested.turns
        ids = found.encoder.prompt(asked, reserve=4)
        assert len(ids) <= longest - 4 and found.encoder.truncated == 0
        numbers.add(len(kept) // 2)
    assert len(numbers) > 2 and max(numbers) < 6


def test_a_test_row_that_has_to_be_cut_itself_is_asked_alone():
    task = some_task()
    long = example("a" * 60, "a", file="test.json")
    assert evaluation(max_length=40).ask(task, long, reserve=4) == long


def test_it_is_a_reference_that_stands_alone():
    for other in ("replay", "frozen"):
        with pytest.raises(ConfigError, match="'icl' trains nothing, so it cannot be applied together with"):
            build([("icl", {}), (other, {})])
    with pytest.raises(ConfigError, match="shots"):
        build([("icl", {"shots": -1})])


def texts(folder):
    (folder / "texts").mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {a}{b} is here."} for a in "abc" for b in "xyz"]
        (folder / "texts" / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture
def config(tmp_path):
    made = tiny_config(tmp_path, tuner=None, evaluation={"max_new_tokens": 3, "bootstrap": 0})
    texts(tmp_path / "tasks")
    del made["stream"]["order"]
    return made


def measured(config, method, output, monkeypatch):
    """The result of a run, and the prompts that the model was asked, as text."""
    prompts = []
    original = respond.generate

    def generate(model, ids, **options):
        prompts.extend(tiny_tokenizer().decode(one) for one in ids)
        return original(model, ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr(respond, "generate", generate)
        return run(config | {"method": method, "output": str(output)}), prompts


def test_a_run_asks_with_demonstrations_and_repeats_its_only_row(config, tmp_path, monkeypatch):
    matrix, prompts = measured(config, "icl", tmp_path / "one", monkeypatch)
    assert matrix["tasks"] == ["blue", "green", "red", "texts"]
    assert len(matrix["scores"]) == 5 and all(row == matrix["scores"][0] for row in matrix["scores"])
    assert not list((tmp_path / "one" / "stages").glob("0[1-9]*"))
    assert len(prompts) == 3 * 8  # three tasks of eight test rows, each asked once
    for name in ("red", "green", "blue"):
        train = json.loads((tmp_path / "tasks" / name / "train.json").read_text())
        test = json.loads((tmp_path / "tasks" / name / "test.json").read_text())
        known = {f"{row['prompt']} {row['answer']}</s>" for row in train}
        own = [prompt.split("\n") for prompt in prompts if prompt.startswith(name)]
        assert sorted(lines[-1] for lines in own) == sorted(row["prompt"] for row in test)
        assert all(len(lines) == 7 and set(lines[:-1]) <= known for lines in own)
    again, prompts_again = measured(config, "icl", tmp_path / "two", monkeypatch)
    assert (again, prompts_again) == (matrix, prompts)


def test_texts_and_no_shots_are_as_without_the_method(config, tmp_path, monkeypatch):
    plain, asked = measured(config, "frozen", tmp_path / "plain", monkeypatch)
    none, asked_none = measured(config, {"name": "icl", "shots": 0}, tmp_path / "none", monkeypatch)
    some, _ = measured(config, "icl", tmp_path / "some", monkeypatch)
    assert none["scores"] == plain["scores"] and asked_none == asked
    at = plain["tasks"].index("texts")
    assert [row[at] for row in some["scores"]] == [row[at] for row in plain["scores"]]
