"""CIA: the average against a loop written plainly, what is measured and saved, and which tasks share weights."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import holdfast.runner.loop
import holdfast.runner.run
import holdfast.runner.stage
from holdfast.api.stage import Step
from holdfast.config.run import load_config
from holdfast.data.encode import Encoder
from holdfast.engines.vectors import gradients, snapshot, weights
from holdfast.errors import ConfigError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.respond import example_losses
from holdfast.methods import build
from holdfast.methods.cia import CIA, common_tokens, nearest
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from holdfast.training.method_state import load_states, save_states
from support.resumed import results
from support.tiny import tiny_config, tiny_model, tiny_rows, tiny_stage, tiny_tokenizer


class Log:
    """Records weights and gradients of every step outside the method, and computes the equation from them."""

    def __init__(self, model):
        self.thetas = [copies(p.data for p in model.parameters())]
        self.gradients = []

    def average(self, strength=1.0, constant=0.99, variant="published", factor=2.0):
        """theta* in float64; and every beta, [steps][tensors]."""
        mean, balances = [t.clone() for t in self.thetas[0]], []
        for step, gradient in enumerate(self.gradients):
            balances.append([])
            for i in range(len(mean)):
                theta, beta = self.thetas[step + 1][i], math.nan
                if step > 0:
                    moved = (theta - self.thetas[step][i]).abs().sum()
                    away = (theta - mean[i]).abs().sum()
                    change = (gradient[i] - self.gradients[step - 1][i]).abs().sum()
                    pull = (gradient[i].abs().sum() + 1) / change
                    beta = float(moved / away * pull if variant == "equation" else 1 - factor / away * pull)
                beta = strength * (beta if 0 < beta < 1 else constant)
                mean[i] = beta * mean[i] + (1 - beta) * theta
                balances[-1].append(beta)
        return mean, balances


def copies(tensors):
    return [t.detach().double().clone() for t in tensors]


def trained(method, steps=30, lr=1e-2, model=None, seed=3):
    """Train a stage without a Trainer, with AdamW, every step logged."""
    model = model or tiny_model()
    rows = tiny_rows(8, seed=seed)
    stage = tiny_stage(model, rows)
    method.before_stage(stage)
    optimizer, log = torch.optim.AdamW(model.parameters(), lr=lr), Log(model)
    for index in range(steps):
        batch = stage.collate([rows[index % 8], rows[(3 * index + 1) % 8]])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        step = Step(stage, index, rows=2, micro_batches=1, logged=True)
        method.after_backward(step, gradients(model))
        log.gradients.append(copies(p.grad for p in model.parameters()))
        optimizer.step()
        method.after_step(step, weights(model))
        log.thetas.append(copies(p.data for p in model.parameters()))
    return model, stage, log


EQUATION = {"variant": "equation"}
NEXT = {"factor": 0.01, "constant": 0.999}


@pytest.mark.parametrize("options", [{}, NEXT, EQUATION, EQUATION | {"strength": 0.5}, EQUATION | {"constant": 0.3}])
def test_the_average_is_the_equations(options):
    method = CIA(**options)
    model, stage, log = trained(method, lr=1e-2 if options else 0.1)
    method.final_weights(stage)
    expected, balances = log.average(**options)
    for p, mean in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.data.double(), mean, rtol=1e-4, atol=1e-6)
    flat = [beta for step in balances for beta in step]
    constant = options.get("strength", 1.0) * options.get("constant", 0.99)
    adapted = [beta for beta in flat if beta != constant]
    assert balances[0] == [constant] * len(expected), "there is no change of the gradient in the first step"
    assert len(adapted) > len(flat) / 20 and len({round(beta, 4) for beta in adapted}) > 10, "beta never adapts"
    assert len(adapted) < len(flat), "the constant is never needed"


def test_it_starts_where_the_stage_begins_and_not_after_the_first_step():
    method = CIA(constant=0.75)
    model, stage, log = trained(method, steps=1)
    method.final_weights(stage)
    for p, before, after in zip(model.parameters(), *log.thetas, strict=True):
        torch.testing.assert_close(p.data.double(), 0.75 * before + 0.25 * after, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [NEXT, EQUATION])
def test_each_tensor_has_a_balance_of_its_own(options):
    method = CIA(**options)
    _, _, log = trained(method)
    assert len({round(beta, 6) for beta in log.average(**options)[1][-1]}) > 1


def test_the_published_average_is_slow_and_the_equations_follows():
    """How far the average is from the weights at the end, as a share of how far they moved."""
    gaps = {}
    for name, options in (("published", {}), ("equation", EQUATION)):
        method = CIA(**options)
        _, _, log = trained(method, steps=60)
        mean = log.average(**options)[0]
        first, last = ([t.flatten() for t in log.thetas[i]] for i in (0, -1))
        gaps[name] = float(
            torch.cat([(a.flatten() - b) for a, b in zip(mean, last, strict=True)]).norm()
            / torch.cat([a - b for a, b in zip(first, last, strict=True)]).norm()
        )
    assert gaps["published"] > 0.3 > gaps["equation"], gaps


def test_a_factor_that_would_do_nothing_is_refused():
    with pytest.raises(ConfigError, match="factor: would change nothing, since variant is equation"):
        CIA(variant="equation", factor=1.0)


def test_the_average_is_float32_where_the_weights_are_not():
    """In bfloat16 a step of (1 - 0.999) of a small difference would round away."""
    method = CIA(constant=0.999)
    model = tiny_model().to(torch.bfloat16)
    trained(method, steps=2, model=model)
    assert all(t.dtype == torch.float32 for t in method.average)
    rounded = [t.to(torch.bfloat16).float() for t in method.average]
    assert any(not torch.equal(t, r) for t, r in zip(method.average, rounded, strict=True))


def test_strength_zero_leaves_the_trained_weights_alone():
    method = CIA(strength=0)
    model, stage, log = trained(method, steps=3)
    method.final_weights(stage)
    assert method.state() == {}
    assert all(torch.equal(p.data.double(), t) for p, t in zip(model.parameters(), log.thetas[-1], strict=True))


def test_a_gradient_that_does_not_change_gives_the_constant():
    method, model = CIA(constant=0.5), tiny_model()
    stage = tiny_stage(model, tiny_rows(2))
    method.before_stage(stage)
    start_weights = snapshot(model)
    for index in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        step = Step(stage, index, 1, 1, False)
        method.after_backward(step, gradients(model))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        method.after_step(step, weights(model))
    method.final_weights(stage)
    for name, p in model.named_parameters():  # 0.5 * (0.5 * 0 + 0.5 * 1) + 0.5 * 2
        torch.testing.assert_close(p.data, start_weights.tensors[name] + 1.25)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by name with nothing but defaults, over the full tuner; every step's weights are recorded."""
    folder = tmp_path_factory.mktemp("cia")
    config = tiny_config(folder, method="cia")
    logs: list[Log] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            logs.append(Log(model))

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            logs[-1].thetas.append(copies(p.data for p in model.parameters()))

    original, after = holdfast.runner.stage.ContinualTrainer.__init__, CIA.after_backward

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Watch())

    def see(self, step, gradient):
        logs[-1].gradients.append(copies(gradient))
        return after(self, step, gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdfast.runner.stage.ContinualTrainer, "__init__", init)
        patch.setattr(CIA, "after_backward", see)
        matrix = holdfast.runner.run.run(config, Progress(quiet=True))
    return folder / "run", matrix, logs


def test_what_a_run_saves_is_the_average(finished):
    run, _, logs = finished
    folders = sorted((run / "stages").glob("0[1-3]-*/model"))
    assert len(folders) == len(logs) == 3
    for stage, (folder, log) in enumerate(zip(folders, logs, strict=True)):
        saved = AutoModelForCausalLM.from_pretrained(folder)
        expected, _ = log.average()
        last = log.thetas[-1]
        for p, mean in zip(saved.parameters(), expected, strict=True):
            torch.testing.assert_close(p.data.double(), mean, rtol=1e-3, atol=1e-5)
        assert any((p.data - t).abs().max() > 1e-3 for p, t in zip(saved.parameters(), last, strict=True))
        if stage < 2:  # the next stage starts from it
            for p, t in zip(saved.parameters(), logs[stage + 1].thetas[0], strict=True):
                assert torch.equal(p.data.double(), t)


def test_what_a_run_measures_is_the_average(finished):
    run, matrix, _ = finished
    config = json.loads((run / "run.json").read_text())["config"]
    setup = prepare(resolve(load_config(config)))
    saved = AutoModelForCausalLM.from_pretrained(run / "stages" / "03-blue" / "model")
    evaluation = ModelEvaluation(saved, setup.encoder, batch_size=4)
    for task, score in zip(setup.stream.tasks, matrix["scores"][-1], strict=True):
        records = holdfast.runner.loop.evaluate_task(evaluation, task, max_new_tokens=3)
        assert score == pytest.approx(sum(r["score"] for r in records) / len(records))


def test_nothing_is_kept_between_stages(finished):
    run, _, _ = finished
    for path in run.glob("stages/*/method/cia.safetensors"):
        assert load_file(path) == {}


class Killed(BaseException):
    """Ends a run at once: nothing in the run catches it."""


def test_a_run_killed_within_a_stage_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """Killed twice: after a checkpoint, and before a stage's first one. With dropout every step depends on the last."""
    tuner = {"name": "lora", "r": 4, "lora_dropout": 0.3}
    config = tiny_config(tmp_path, method={"name": "cia", "grouping": 0.9}, tuner=tuner)
    config["training"] |= {"epochs": 2, "save_every": 4}  # 6 steps a stage
    holdfast.runner.run.run(config | {"output": str(tmp_path / "whole")}, Progress(quiet=True))
    watch = holdfast.runner.stage.StageWatch.on_step_end
    for stage, step in [(2, 5), (3, 2)]:

        def dying(self, args, state, control, stage=stage, step=step, **kwargs):
            watch(self, args, state, control, **kwargs)
            if (self.stage.index, state.global_step) == (stage, step):
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", dying)
            with pytest.raises(Killed):
                holdfast.runner.run.run(config, Progress(quiet=True))
    holdfast.runner.run.run(config, Progress(quiet=True))
    one, two = results(tmp_path / "whole"), results(tmp_path / "run")
    for key in one:
        assert one[key] == two[key], key


# Grouping


def sentences(instruction, count=12, seed=0):
    """Prompts: the same instruction around different content."""
    chance = random.Random(seed)
    content = ["".join(chance.choice("mnopqrs") for _ in range(chance.randrange(3, 9))) for _ in range(count)]
    return [f"{instruction}: {text}?" for text in content]


def encoded(prompts):
    tokenizer = tiny_tokenizer()
    rows = []
    for text in prompts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows.append({"input_ids": [*ids, 4], "labels": [-100] * len(ids) + [4]})
    return rows


def test_an_instruction_is_what_all_prompts_of_a_task_share():
    assert common_tokens([[1, 5, 5, 9], [5, 1, 7], [1, 8, 5, 5, 5]]) == {"1": 1.0, "5": 2.0}


def test_similarity_is_the_cosine_of_smoothed_tf_idf():
    query, known = {"1": 2.0, "3": 1.0}, [{"1": 1.0, "2": 1.0}, {"4": 1.0}]
    # three documents; 1 stands in two of them, the others in one
    one, rare = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    cosine = 2 * one * one / (math.hypot(2 * one, rare) * math.hypot(one, rare))
    index, similarity = nearest(query, known)
    assert index == 0 and similarity == pytest.approx(cosine, abs=1e-6)
    assert nearest(query, [query])[1] == 1.0
    assert nearest(query, []) is None and nearest({}, known)[1] == 0.0


def grouped_stages(instructions, grouping=0.9):
    """Train four steps on a task of each instruction; return the weights after each stage."""
    method, model = CIA(grouping=grouping, strength=0.5), tiny_model()
    first, ends, starts = snapshot(model), [], []
    for index, instruction in enumerate(instructions, start=1):
        stage = tiny_stage(model, encoded(sentences(instruction, seed=index)), index=index)
        method.before_stage(stage)
        starts.append(snapshot(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for i in range(4):
            optimizer.zero_grad()
            model(**stage.collate(stage.rows[i : i + 4])).loss.backward()
            step = Step(stage, i, 4, 1, False)
            method.after_backward(step, gradients(model))
            optimizer.step()
            method.after_step(step, weights(model))
        method.final_weights(stage)
        ends.append(snapshot(model))
    return method, model, first, starts, ends


def equal(one, two):
    return all(torch.equal(t, two.tensors[name]) for name, t in one.tensors.items())


def test_tasks_of_one_instruction_share_weights_and_others_begin_anew():
    method, _, first, starts, ends = grouped_stages(["add it up", "who wrote", "add it up"])
    assert [group for group, _ in method.instructions] == [0, 1, 0]
    assert equal(starts[0], first) and equal(starts[1], first), "a new group begins with the model's first weights"
    assert equal(starts[2], ends[0]), "a known group goes on where it ended"
    assert equal(method.groups[0], ends[2]) and equal(method.groups[1], ends[1])


def test_a_low_threshold_makes_one_group():
    method, _, _, starts, ends = grouped_stages(["add it up", "who wrote"], grouping=0.01)
    assert [group for group, _ in method.instructions] == [0, 0] and equal(starts[1], ends[0])


def test_test_rows_are_answered_by_the_weights_of_their_instruction():
    method, model, _, _, ends = grouped_stages(["add it up", "who wrote"])
    evaluation = ModelEvaluation(model, Encoder(tiny_tokenizer(), max_length=64), batch_size=4, methods=[method])
    prompts = [*sentences("add it up", 3, seed=7), *sentences("who wrote", 3, seed=8)]
    order = [0, 3, 1, 4, 2, 5]
    rows = [encoded(prompts)[i] for i in order]
    answered = {}
    for part in evaluation.parts(rows):
        held = snapshot(model)
        for i in part:
            answered[order[i]] = held
    assert sorted(answered) == list(range(6))
    assert all(equal(answered[i], ends[0]) for i in range(3)) and all(equal(answered[i], ends[1]) for i in range(3, 6))
    assert equal(snapshot(model), ends[1]), "the model is as it was"
    parts = evaluation.parts(rows)
    next(parts)
    parts.close()
    assert equal(snapshot(model), ends[1]), "the model is as it was where the evaluation stops early"


def test_losses_come_from_the_weights_of_the_instruction(tmp_path):
    config = tiny_config(tmp_path, method={"name": "cia", "grouping": 0.9})
    holdfast.runner.run.run(config, Progress(quiet=True))
    setup = prepare(resolve(load_config(config)))
    stages = [tmp_path / "run" / "stages" / name for name in ("01-red", "02-green", "03-blue")]
    model = AutoModelForCausalLM.from_pretrained(stages[2] / "model")
    load_states(setup.methods, stages[2] / "method", model)
    assert [group for group, _ in setup.methods[0].instructions] == [0, 1, 2]
    evaluation = ModelEvaluation(model, setup.encoder, batch_size=4, methods=setup.methods)
    for stage, task in zip(stages, setup.stream.tasks, strict=True):
        own = AutoModelForCausalLM.from_pretrained(stage / "model")
        alone = ModelEvaluation(own, setup.encoder, batch_size=4)
        here, there = example_losses(evaluation, task.test)[0], example_losses(alone, task.test)[0]
        assert here == pytest.approx(there)


def test_state_with_groups_loads_and_goes_on(tmp_path):
    method, model, *_ = grouped_stages(["add it up", "who wrote"])
    save_states([method], tmp_path)
    [other] = build([("cia", {"grouping": 0.9, "strength": 0.5})])
    load_states([other], tmp_path, model)
    assert other.instructions == method.instructions and other.group == method.group
    assert equal(other.first, method.first)
    assert list(other.groups) == [0, 1] and all(equal(other.groups[g], method.groups[g]) for g in (0, 1))
    stage = tiny_stage(model, encoded(sentences("add it up", seed=5)), index=3)
    other.before_stage(stage)
    assert equal(snapshot(model), method.groups[0])
