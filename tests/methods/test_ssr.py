"""SSR: prompts that the first model writes, which of them are taken, and the newest model's answers to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import holdfast.methods.ssr as module
from holdfast.api.rows import last_answer
from holdfast.api.task import Example, Turn
from holdfast.config.run import load_config
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError, DataError
from holdfast.methods import build
from holdfast.methods.ssr import SSR
from holdfast.models.sampling import Samples
from holdfast.rehearsal.clusters import nearest_to_centres, shares
from holdfast.rehearsal.synthesis import Form
from holdfast.runner.setup import prepare, resolve
from support.families import FAMILIES, family_tokenizer
from support.tiny import tiny_config, tiny_model, tiny_stage, tiny_tokenizer
from support.trained import trained

MARKS = {"input": "in:", "output": "out:"}
CHATS = [name for name, family in FAMILIES.items() if family.template]
WORDS = ["ab", "cd e", "fgh", "i"]


def rows_of(tokenizer, asked="say {}, please", answers="wxyz", before=()):
    encoder = Encoder(tokenizer, max_length=1000)
    turns = [
        (*before, Turn("user", asked.format(word)), Turn("assistant", a))
        for word, a in zip(WORDS, answers, strict=True)
    ]
    return encoder, [encoder.encode(Example("", n, both))[-1] for n, both in enumerate(turns)]


@pytest.mark.parametrize("family", ["plain", *CHATS])
def test_the_form_of_a_task_is_what_its_prompts_have_in_common(family):
    tokenizer = tiny_tokenizer() if family == "plain" else family_tokenizer(family)
    encoder, rows = rows_of(tokenizer)
    form = Form.of(rows, encoder, ("in:", "out:"))
    assert [form.input(row) for row in rows] == WORDS and form.said == "say\n, please"
    for row in rows:
        prompt, answer = last_answer(row)
        assert form.prompt(form.input(row)) == prompt
        ends = len(answer) - len(form.end)
        assert form.row(prompt, answer[:ends]) == {key: row[key] for key in ("input_ids", "labels")}
        assert form.end and form.end[0] in encoder.stop_ids
    text = tokenizer.decode(form.request(rows[:2]), skip_special_tokens=True)
    assert text == "say\n, please\n\nin: ab\nout: w\n\nin: cd e\nout: x\n\nin:"


def test_of_one_prompt_all_but_the_template_is_the_input():
    encoder, rows = rows_of(tiny_tokenizer())
    form = Form.of(rows[:1], encoder, ("in:", "out:"))
    assert form.input(rows[0]) == "say ab, please" and form.said == ""
    assert form.prompt("do it") == encoder.inside("do it")


def test_inputs_are_read_where_an_answer_follows_them():
    encoder, rows = rows_of(tiny_tokenizer())
    form = Form.of(rows, encoder, ("in:", "out:"))
    text = " one\nout: w\n\nin: two \nout: x\n\nin:\nout: y\n\nin: three out: out: z in: four"
    assert form.read(encoder.inside(text)) == ["one", "two"]


def test_of_each_cluster_those_nearest_to_its_centre_are_taken_in_proportion_to_its_size():
    chance, sizes = np.random.default_rng(0), [30, 12, 6]
    centres = 50 * np.eye(3, 5)
    points = np.concatenate([c + chance.normal(size=(n, 5)) for c, n in zip(centres, sizes, strict=True)])
    order = chance.permutation(len(points))
    chosen = nearest_to_centres(points[order], 16, 3, seed=1)
    expected = []
    for first, size, count in zip((0, 30, 42), sizes, (10, 4, 2), strict=True):
        own = points[first : first + size]
        nearest = np.argsort(np.linalg.norm(own - own.mean(0), axis=1))[:count]
        expected += [int(np.flatnonzero(order == first + place)[0]) for place in nearest]
    assert chosen == sorted(expected)
    assert nearest_to_centres(points, 48, 3, seed=1) == [*range(48)] == nearest_to_centres(points, 99, 3, seed=1)
    assert len(nearest_to_centres(np.zeros((9, 2)), 4, 20, seed=1)) == 4


def test_shares_are_whole_and_nearest_to_proportion():
    chance = np.random.default_rng(1)
    for _ in range(50):
        sizes = chance.integers(0, 9, size=5)
        sizes[0] += 1
        count = int(chance.integers(1, sizes.sum() + 1))
        found = shares(sizes, count)
        assert sum(found) == count and all(
            abs(f - s * count / sizes.sum()) < 1 for f, s in zip(found, sizes, strict=True)
        )
        assert all(f <= s for f, s in zip(found, sizes, strict=True))


def greedy(model, prompt, most):
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


def test_the_first_model_writes_and_the_newest_answers(monkeypatch):
    """With a generator that writes given texts."""
    tokenizer, model = tiny_tokenizer(), tiny_model(initializer_range=0.25, tie_word_embeddings=False)
    model.lm_head.weight.data[2] *= 2.5  # answers end
    encoder, rows = rows_of(tokenizer)
    written = [f"in: {a}{b}\nout: q" for a in "klmno" for b in "pqrst"]
    texts = [" cd e\nout: w\n\nin: ab\nout: w", "nothing", *(" ".join(written[n : n + 2])[3:] for n in range(0, 25, 2))]
    first, asked, method = (
        model.state_dict()["model.norm.weight"].clone(),
        [],
        SSR(samples=9, candidates=2, clusters=3, **MARKS),
    )

    def fake(of, prompts, *, max_new_tokens, seed, numbers, **given):
        assert torch.equal(of.model.norm.weight, first) and given["temperature"] == 0.9 and given["top_p"] == 0.6
        asked.extend(prompts)
        return Samples([encoder.inside(texts[n % len(texts)]) for n in numbers], [], [])

    monkeypatch.setattr(module, "sample", fake)
    stage = tiny_stage(model, rows)
    stage.tokenizer = tokenizer
    method.before_stage(stage)
    assert not method.declares(stage) and method.extra_rows(None) is None
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    now = model.model.norm.weight.clone()
    method.after_stage(stage)
    assert len(method.pool) == 4 and method.longest == 3
    method.longest = 30  # answers of an untrained model are long
    stage = tiny_stage(model, rows, index=2)
    stage.tokenizer = tokenizer
    method.before_stage(stage)
    assert torch.equal(model.model.norm.weight, now) and not len(method.pool)
    assert len(asked) == 18 and all(tokenizer.decode(one).count("in:") == 3 for one in asked)
    form, found = Form.of(rows, encoder, ("in:", "out:")), [method.memory.rows[i] for i in range(len(method.memory))]
    known = {a + b for a in "klmno" for b in "pqrst"}
    assert found and len({form.input(row) for row in found}) == len(found) <= 9
    for row in found:
        prompt, answer = last_answer(row)
        assert form.input(row) in known and answer == greedy(model, prompt, 31) and answer[-1] == 2
        assert len(answer) <= method.longest
    assert method.declares(stage) == ("ssr",)


def test_the_newest_model_answers_before_a_group_of_cia_takes_its_place():
    assert [method.name for method in build([("cia", {"grouping": 0.5}), ("ssr", {})])] == ["ssr", "cia"]


def test_its_state_is_read_back(tmp_path):
    tokenizer = tiny_tokenizer()
    _, rows = rows_of(tokenizer)
    method, again = SSR(**MARKS), SSR(**MARKS)
    trained(tmp_path, rows=rows, method=method, processing_class=tokenizer)
    again.load_state(method.state(), tiny_model())
    assert again.pool.rows == method.pool.rows and again.longest == 3
    assert all(torch.equal(t, method.first.tensors[name]) for name, t in again.first.tensors.items())
    begin = dict(tiny_model().named_parameters())
    assert all(torch.equal(t, begin[name]) for name, t in again.first.tensors.items())


def test_what_cannot_work_is_refused_with_the_reason_before_training(tmp_path):
    tokenizer = tiny_tokenizer()
    texts = [{"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}]
    with pytest.raises(DataError, match="task 'stage 1', row 1: has no prompt before its answer"):
        trained(tmp_path, rows=texts, method=SSR(), processing_class=tokenizer)
    _, talks = rows_of(tokenizer, before=(Turn("user", "hi"), Turn("assistant", "hi you")))
    with pytest.raises(DataError, match="task 'stage 1', row 1: is a conversation of several turns"):
        trained(tmp_path, rows=talks, method=SSR(), processing_class=tokenizer)
    with pytest.raises(ConfigError, match="needs processing_class, the tokenizer"):
        trained(tmp_path, rows=rows_of(tokenizer)[1], method=SSR())
    for other in ("o_lora", "gain_lora"):
        with pytest.raises(ConfigError, match="exchanges what is trained"):
            build([("ssr", {}), (other, {})])
    config = tiny_config(tmp_path, method="ssr", data={"supervise": "all"})
    with pytest.raises(DataError, match=r"train.json: row 1: has no prompt before its answer: .*supervise"):
        prepare(resolve(load_config(config)))
