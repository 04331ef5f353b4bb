"""LFPT5: one prompt answers and writes; what it wrote of past tasks is whole, its own, and keeps them alive."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

import holdfast.runner.loop
import holdfast.runner.run
import holdfast.runner.stage
from holdfast import ContinualTrainer
from holdfast.api.stage import Rehearsed, Step
from holdfast.errors import ConfigError
from holdfast.methods.lfpt5 import LFPT5
from holdfast.rehearsal.pseudo import Writing, write_samples
from holdfast.system.progress import Progress
from holdfast.training.method_state import load_states, save_states
from holdfast.tuners.prompt_tuning import PromptTuning
from support.hints import WORDS, hinted_config, hinted_model, tokens
from support.tiny import pad_rows, tiny_model, tiny_stage, tiny_tokenizer

END = 2
WRITING = Writing.of(tiny_tokenizer(), "red")


def row(question: str, answer: str) -> dict[str, list[int]]:
    before, after = tokens(question), [*tokens(answer), END]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def rows_of(word: str, count: int = 12) -> list[dict[str, list[int]]]:
    chance = random.Random(word)
    return [row(f"{word}: {chance.choice('abcdef')}{chance.choice('ghijkl')}?", f" {word[0]}") for _ in range(count)]


def prompted(hint: str = ""):
    """The hinted model; its prompt is the hint's embeddings."""
    init = {"prompt_tuning_init": "RANDOM"}
    model = PromptTuning(num_virtual_tokens=len(hint) or 4, **init).prepare(hinted_model()).eval()
    if hint:
        with torch.no_grad():
            table = model.get_base_model().get_input_embeddings().weight
            model.prompt_encoder["default"].embedding.weight.copy_(table[tokens(hint)])
    return model


def stage_of(model, index, word):
    stage = tiny_stage(model, rows_of(word), index)
    stage.task, stage.tokenizer = word, tiny_tokenizer()
    return stage


def text(ids) -> str:
    return tiny_tokenizer().decode(ids)


def test_a_row_is_read_as_it_was_written():
    for one in (row("red: ab?", " r"), row("?", " a longer answer."), *rows_of("green")):
        written = WRITING.write(one)
        start = len(WRITING.start)
        assert written["input_ids"][:start] == WRITING.start
        assert written["labels"] == [-100] * start + written["input_ids"][start:]
        assert WRITING.read(written["input_ids"][start:]) == one
        assert len(written["input_ids"]) == len(one["input_ids"]) + WRITING.extra


def test_the_last_answer_of_a_conversation_and_a_text_as_a_whole_are_answers():
    first, last = row("red: ab?", " r"), row("\nred: cd?", " g")
    both = {key: first[key] + last[key] for key in first}
    read = WRITING.read(WRITING.write(both)["input_ids"][len(WRITING.start) :])
    assert read["input_ids"] == both["input_ids"]
    assert read["labels"] == [-100] * (len(both["labels"]) - 3) + both["labels"][-3:]
    ids = [*tokens("holdfast"), END]
    assert WRITING.read(WRITING.write({"input_ids": ids, "labels": ids})["input_ids"][len(WRITING.start) :]) == {
        "input_ids": ids,
        "labels": ids,
    }


@pytest.mark.parametrize("broken", ["no end", "no separator", "two separators", "no answer", "nothing"])
def test_what_is_no_whole_row_is_not_read(broken):
    written = WRITING.write(row("red: ab?", " r"))["input_ids"][len(WRITING.start) :]
    before = tokens("red: ab?")
    assert WRITING.read(written) is not None
    assert (
        WRITING.read(
            {
                "no end": written[:-1],
                "no separator": [*before, 5, END, *WRITING.end],
                "two separators": before + WRITING.separator * 2 + [5, END] + WRITING.end,
                "no answer": before + WRITING.separator + WRITING.end,
                "nothing": [],
            }[broken]
        )
        is None
    )


def test_a_beginning_of_sequence_token_stays_at_the_beginning():
    writing = Writing([1], WRITING.mark, WRITING.separator, WRITING.end)
    one = {"input_ids": [1, *tokens("ab? c")], "labels": [-100] * 4 + tokens("ab? c")[3:]}
    written = writing.write(one)["input_ids"]
    assert written[: len(WRITING.mark) + 1] == [1, *WRITING.mark] and written.count(1) == 1
    assert writing.read(written[len(writing.start) :]) == one


write = partial(write_samples, on_batch=lambda done, total: None)


def test_samples_depend_on_their_seed_alone_and_touch_no_other_random_state():
    model = prompted("rrrr")
    options = {"length": 60, "batch_size": 5, "top_k": 64}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = write(model, WRITING, 12, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert write(model.train(), WRITING, 12, seed=3, **options) == found and model.training
    assert write(model, WRITING, 12, seed=4, **options) != found
    assert len({tuple(one["input_ids"]) for one in found}) > 8


def test_sampling_from_one_token_is_a_plain_greedy_loop_without_cache():
    model = prompted("rrrr")
    ids = list(WRITING.start)
    while ids[-len(WRITING.end) :] != WRITING.end:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    [found, again] = write(model, WRITING, 2, length=60, batch_size=2, top_k=1, seed=0)
    assert found == again == WRITING.read(ids[len(WRITING.start) :])


def test_samples_have_a_prompt_of_their_task_and_an_answer():
    for word in WORDS:
        writing = Writing.of(tiny_tokenizer(), word)
        found = write(prompted("rrrr"), writing, 40, length=60, batch_size=20, top_k=64, seed=0)
        assert len(found) == 40
        answers = Counter()
        for one in found:
            length = one["labels"].count(-100)
            assert one["labels"] == [-100] * length + one["input_ids"][length:]
            answers[text(one["input_ids"][length:])] += 1
        starts = sum(text(one["input_ids"]).startswith(f"{word}: ") for one in found)
        assert starts >= 36 and answers[" r</s>"] >= 8  # one in 64 before training


def after_a_stage(options=None, hint="rrrr"):
    """A method that has learned red and is about to learn green."""
    model = prompted(hint)
    method = LFPT5(**{"samples": 8} | (options or {}))
    first = stage_of(model, 1, "red")
    method.before_stage(first)
    method.after_stage(first)
    stage = stage_of(model, 2, "green")
    method.before_stage(stage)
    return method, stage


def test_the_first_stage_only_learns_to_write():
    method, stage = LFPT5(), stage_of(prompted(), 1, "red")
    method.before_stage(stage)
    assert method.declares(stage) == ("lfpt5/lm",)
    extra = method.extra_rows(Step(stage, 0, rows=6, micro_batches=1, logged=True))
    assert len(extra.rows) == 6
    written = [WRITING.write(one) for one in stage.rows]
    assert all(one in written for one in extra.rows)


def test_a_later_stage_rehearses_what_the_model_wrote():
    method, stage = after_a_stage()
    assert method.declares(stage) == ("lfpt5", "lfpt5/kl", "lfpt5/lm")
    assert len(method.memory) == 8
    extra = method.extra_rows(Step(stage, 0, rows=8, micro_batches=1, logged=True))
    assert [sample >= 0 for sample in extra.samples] == [True] * 2 + [False] * 8
    assert all(one == method.memory.rows[sample] for one, sample in zip(extra.rows[:2], extra.samples, strict=False))
    green = Writing.of(tiny_tokenizer(), "green")
    known = [green.write(one) for one in stage.rows] + [WRITING.write(one) for one in method.memory.rows]
    assert all(one in known for one in extra.rows[2:])
    many = [
        tuple(one["input_ids"])
        for index in range(20)
        for one in method.extra_rows(Step(stage, index, rows=8, micro_batches=1, logged=True)).rows[2:]
    ]
    assert any(tuple(WRITING.write(one)["input_ids"]) in many for one in method.memory.rows)


def terms_of(method, stage, step, extra, parts):
    """The terms of each micro-batch, computed from its rows as the trainer does."""
    found = []
    for places in parts:
        batch = pad_rows([extra.rows[i] for i in places])
        labels = batch.pop("labels")
        samples = [extra.samples[i] for i in places]
        step.rehearsed = {"lfpt5": Rehearsed(samples, labels, stage.model(**batch).logits, (), share=0.0)}
        found.append(method.loss_terms(step, {}, None))
    return {name: sum(part.get(name, 0) for part in found) / len(parts) for name in method.declares(stage)}


def test_the_terms_are_the_equation():
    """Against a plain loop over rows, and a copy of the model as it was."""
    method, stage = after_a_stage({"lm_weight": 0.3, "weight": 0.7, "kl_weight": 0.2, "ratio": 0.5})
    model = stage.model
    step = Step(stage, 0, rows=8, micro_batches=1, logged=True)
    extra = method.extra_rows(step)
    everything = list(range(len(extra.rows)))

    def log_p(one):
        logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0]
        kept = [s for s in range(1, len(one["labels"])) if one["labels"][s] != -100]
        return F.log_softmax(logits, -1)[[s - 1 for s in kept]], [one["labels"][s] for s in kept]

    with torch.no_grad():
        before = {i: log_p(extra.rows[i])[0] for i in everything}
    at_start = terms_of(method, stage, step, extra, [everything])
    assert abs(float(at_start["lfpt5/kl"])) < 1e-6 and float(at_start["lfpt5"]) > 0

    prompt = model.prompt_encoder["default"].embedding.weight
    torch.manual_seed(0)
    with torch.no_grad():
        prompt.add_(0.5 * torch.randn_like(prompt))
    sums = {"lfpt5": 0.0, "lfpt5/kl": 0.0, "lfpt5/lm": 0.0}
    counts = Counter()
    for i, (one, sample) in enumerate(zip(extra.rows, extra.samples, strict=True)):
        now, labels = log_p(one)
        kind = "lm" if sample < 0 else "pseudo"
        counts[kind] += len(labels)
        nll = -sum(now[s, label] for s, label in enumerate(labels))
        if kind == "lm":
            sums["lfpt5/lm"] += 0.3 * nll
        else:
            sums["lfpt5"] += 0.7 * nll
            sums["lfpt5/kl"] += 0.2 * (before[i].exp() * (before[i] - now)).sum()
    expected = {name: s / counts["lm" if name.endswith("lm") else "pseudo"] for name, s in sums.items()}
    found = terms_of(method, stage, step, extra, [everything])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        assert (
            float(torch.autograd.grad(found[name], [*stage.model.parameters()][-1:], retain_graph=True)[0].norm()) > 0
        )
    step.micro_batches = 3
    in_parts = terms_of(method, stage, step, extra, [everything[0::3], everything[1::3], everything[2::3]])
    for name, value in expected.items():
        torch.testing.assert_close(in_parts[name], value, rtol=1e-4, atol=1e-6)


def test_where_the_head_is_trained_kl_is_to_what_it_was():
    """With ``full``: p_before is the model before its first step, also after a restart."""
    options, model = {"samples": 8, "kl_weight": 0.2, "lm_weight": 0}, hinted_model()
    method, again = LFPT5(**options), LFPT5(**options)
    method.tasks, method.lengths = ["red"], [60]
    stage = stage_of(model, 2, "green")
    method.before_stage(stage)
    step = Step(stage, 0, rows=32, micro_batches=1, logged=True)
    extra = method.extra_rows(step)
    again.load_state(method.state(), model)
    again.tokens = method.tokens
    everything = [list(range(len(extra.rows)))]
    assert abs(float(terms_of(method, stage, step, extra, everything)["lfpt5/kl"].detach())) < 1e-6

    def log_p(one):
        logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0].log_softmax(-1)
        return logits[[s - 1 for s, label in enumerate(one["labels"]) if label != -100]]

    with torch.no_grad():
        before = [log_p(one) for one in extra.rows]
        model.get_output_embeddings().weight.mul_(1.5)
        now = [log_p(one) for one in extra.rows]
    gaps = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, now, strict=True)])
    for one in (method, again):
        found = terms_of(one, stage, step, extra, everything)["lfpt5/kl"]
        torch.testing.assert_close(found, 0.2 * gaps.mean(), rtol=1e-4, atol=1e-6)
    assert float(gaps.mean()) > 1e-3


def test_weights_of_zero_leave_their_part_out():
    method, stage = after_a_stage({"lm_weight": 0})
    assert method.declares(stage) == ("lfpt5", "lfpt5/kl")
    method, stage = after_a_stage({"kl_weight": 0})
    assert method.declares(stage) == ("lfpt5", "lfpt5/lm") and not method.before
    method, stage = after_a_stage({"weight": 0, "kl_weight": 0})
    assert method.declares(stage) == ("lfpt5/lm",) and not len(method.memory)
    method, stage = after_a_stage({"weight": 0, "kl_weight": 0, "lm_weight": 0})
    assert method.declares(stage) == ()
    assert method.extra_rows(Step(stage, 0, rows=8, micro_batches=1, logged=True)) is None


def test_state_survives_a_restart(tmp_path):
    method, stage = after_a_stage()
    save_states([method], tmp_path)
    other = LFPT5(samples=8)
    load_states([other], tmp_path, stage.model)
    one, two = method.state(), other.state()
    assert one.keys() == two.keys() and one["learned"] == ["red"] and len(one["lengths"]) == 8
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
    assert other.memory.rows == method.memory.rows
    # A stage that begins again writes the same samples.
    again = LFPT5(samples=8)
    again.load_state(method.state(), stage.model)
    again.before_stage(stage)
    assert again.memory.rows == method.memory.rows
    assert all(torch.equal(a, b) for a, b in zip(again.before, method.before, strict=True))


def test_where_nothing_whole_is_written_it_says_so_and_goes_on(caplog):
    model = PromptTuning(num_virtual_tokens=4).prepare(tiny_model())
    method = LFPT5(samples=3)
    for index, word in enumerate(("red", "green"), start=1):
        stage = stage_of(model, index, word)
        method.before_stage(stage)
        assert method.declares(stage) == ("lfpt5/lm",)
        method.after_stage(stage)
    assert "0 of 3 pseudo samples of task red" in caplog.text


def test_in_a_trainer_of_ones_own_it_needs_the_tokenizer(tmp_path):
    rows = rows_of("red")
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True)

    def train(model, tokenizer):
        ContinualTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=pad_rows,
            processing_class=tokenizer,
            method="lfpt5",
        ).train()

    with pytest.raises(ConfigError, match="processing_class"):
        train(prompted(), None)
    train(prompted(), tiny_tokenizer())


def config_of(folder: Path, method, seed: int = 0, epochs: float = 20, **changes):
    config = hinted_config(folder, method, seed=seed, **changes)
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": epochs}
    return config


def run(config):
    return holdfast.runner.run.run(config, Progress(quiet=True))


def forgotten(folder: Path, seeds: range) -> tuple[float, float]:
    found = []
    for method, changes in (({"name": "lfpt5", "lm_weight": 1.0}, {}), ("sequential", {"tuner": "prompt"})):
        runs = []
        for seed in seeds:
            config = config_of(folder, method, seed, 24, output=str(folder / f"{len(found)}-{seed}"), **changes)
            config["training"]["learning_rate"] = 0.01
            runs.append(run(config))
        found.append(sum(matrix["summary"]["forgetting"] for matrix in runs) / len(runs))
    return found[0], found[1]


@pytest.mark.slow
def test_it_forgets_less(tmp_path):
    ours, plain = forgotten(tmp_path, range(1, 3))
    assert ours <= plain - 0.3, (ours, plain)


@pytest.mark.slow
def test_it_forgets_less_over_six_seeds(tmp_path):
    ours, plain = forgotten(tmp_path, range(6))
    assert ours <= plain - 0.2, (ours, plain)


class Killed(BaseException):
    """Ends a run at once, like a signal."""


def test_killed_with_pseudo_samples_in_hand_and_continued_it_is_the_unbroken_run(tmp_path, monkeypatch):
    def results(output: Path) -> dict[str, str | bytes]:
        files = [*output.glob("stages/*/adapter/*.safetensors"), *output.glob("stages/*/method/*")]
        return {str(path.relative_to(output)): path.read_bytes() for path in [*files, output / "matrix.json"]}

    options = {"name": "lfpt5", "samples": 10}
    unbroken = tmp_path / "unbroken"
    run(config_of(tmp_path, options, epochs=2, output=str(unbroken)))
    broken = config_of(tmp_path, options, epochs=2, output=str(tmp_path / "broken"))
    broken["training"]["save_every"] = 4
    watch = holdfast.runner.stage.StageWatch.on_step_end

    def dying(self, args, state, control, **kwargs):
        watch(self, args, state, control, **kwargs)
        if self.stage.index == 2 and state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", dying)
        with pytest.raises(Killed):
            run(broken)
    assert list((tmp_path / "broken").glob("stages/02-green/checkpoint/checkpoint-4/complete.json"))
    run(broken)
    assert results(tmp_path / "broken") == results(unbroken)
    saved = json.loads((unbroken / "stages/02-green/method/lfpt5.json").read_text())
    assert saved["learned"] == ["red", "green"] and len(saved["answers"]) == 10


@pytest.mark.slow
def test_pseudo_samples_are_not_the_tests(tmp_path):
    """By name on three tasks with nothing but defaults; no test prompt is used to write, and few come up by chance."""
    seen: list[list[dict[str, list[int]]]] = []
    original = LFPT5.before_stage

    def watch(self, stage):
        original(self, stage)
        seen.append(list(self.memory.rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LFPT5, "before_stage", watch)
        config = hinted_config(tmp_path, "lfpt5")
        config["training"] |= {"epochs": 6, "learning_rate": 1e-2}
        matrix = run(config)
    assert len(matrix["scores"]) == 4
    assert [len(rows) for rows in seen[:2]] == [0, 100] and len(seen[2]) > 100
    tests = {
        json_row["prompt"]
        for word in WORDS
        for json_row in json.loads((tmp_path / "tasks" / word / "test.json").read_text())
    }
    written = {text(one["input_ids"][: one["labels"].count(-100)]) for one in seen[2]}
    assert len(written & tests) < 0.2 * len(tests) + 2 and len(written) > 60
