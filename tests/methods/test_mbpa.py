"""MbPA++: the memory's nearest rows, adaptation to them against a plain loop, and a model that comes back whole."""

from __future__ import annotations

import copy
import random

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainingArguments

import holdfast.runner.measure
import holdfast.runner.run
from holdfast.api.stage import Step
from holdfast.data.collate import Collator
from holdfast.data.encode import Encoder
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.methods import build
from holdfast.methods.mbpa import MbPA
from holdfast.methods.parts.queries import prompt_queries
from holdfast.models.generation import generate
from holdfast.models.likelihood import token_losses
from holdfast.system.progress import Progress
from holdfast.training.method_state import load_states, save_states
from holdfast.training.trainer import ContinualTrainer
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage, tiny_tokenizer

ANSWERED = {"max_new_tokens": 4, "batch_size": 1, "eos_token_ids": [2], "pad_token_id": 0}


def lora_model(seed=0):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules="all-linear")
    return peft.get_peft_model(tiny_model(seed, attention_dropout=0.5), config)


def evaluation(model, *methods, batch_size=3):
    return ModelEvaluation(model, Encoder(tiny_tokenizer(), max_length=64), batch_size, list(methods))


def shift(model, seed, scale=0.1):
    torch.manual_seed(seed)
    for t in weights(model):
        t.add_(scale * torch.randn_like(t))


def after_stages(count=2, model=None, rows=12, **options):
    model = lora_model() if model is None else model
    method = MbPA(**{"neighbours": 5, "steps": 4, "learning_rate": 0.5} | options)
    for index in range(1, count + 1):
        stage = tiny_stage(model, tiny_rows(rows, seed=index), index)
        method.before_stage(stage)
        shift(model, index)
        method.after_stage(stage)
    return method, model


def prompts(count, seed=9):
    return [{"input_ids": row["input_ids"][:-1]} for row in tiny_rows(count, seed=seed)]


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    return all(torch.equal(before[name], p) for name, p in model.named_parameters())


def plain_adaptation(model, rows, steps, learning_rate, strength):
    """A copy of the model after plain SGD on the paper's objective, each neighbour by itself."""
    local = copy.deepcopy(model).eval()
    trained = [p for p in local.parameters() if p.requires_grad]
    origin = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = strength * sum(((p - o) ** 2).sum() for p, o in zip(trained, origin, strict=True))
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            log_p = F.log_softmax(local(input_ids=ids).logits[0], dim=-1)
            answer = [s for s in range(1, len(row["labels"])) if row["labels"][s] != -100]
            loss = loss - sum(log_p[s - 1, row["labels"][s]] for s in answer) / len(answer) / len(rows)
        loss.backward()
        optimizer.step()
    return local


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("strength", [0.0, 0.2])
def test_local_adaptation_is_plain_sgd_on_the_neighbours(kind, strength):
    method, model = after_stages(model=lora_model() if kind == "lora" else tiny_model(), strength=strength)
    rows = prompts(3)
    before = snapshot(model)
    this = evaluation(model)
    nearest = method.nearest(this, rows)
    seen = 0
    for part in method.at_test(this, rows):
        local = plain_adaptation(
            model_at(model, before), [method.memory.rows[i] for i in nearest[part[0]]], 4, 0.5, strength
        )
        moved = 0.0
        for (name, p), (_, q) in zip(model.named_parameters(), local.named_parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
            moved = max(moved, float((p - before[name]).abs().max()))
        assert moved > 1e-2
        seen += len(part)
    assert seen == 3


def model_at(model, values):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(values[name])
    return other


def test_the_penalty_holds_the_weights_near_the_trained_ones():
    distances = []
    for strength in (0.0, 0.5):
        method, model = after_stages(strength=strength)
        before = snapshot(model)
        next(parts := method.at_test(evaluation(model), prompts(1)))
        distances.append(sum(float((p - before[name]).square().sum()) for name, p in model.named_parameters()))
        parts.close()
    assert 0 < distances[1] < 0.7 * distances[0]


def test_generation_uses_the_adapted_weights_and_gradients_come_again_after_it():
    """Generation runs in inference mode; later computations must still be differentiable."""
    method, model = after_stages()
    rows, found = prompts(6), {}
    for part in evaluation(model, method).parts(rows):
        for i, response in zip(part, generate(model, [rows[i]["input_ids"] for i in part], **ANSWERED), strict=True):
            found[i] = response
    plain = generate(model, [row["input_ids"] for row in rows], **ANSWERED)
    this = evaluation(model)
    for i, nearest in enumerate(method.nearest(this, rows)):
        local = plain_adaptation(model, [method.memory.rows[j] for j in nearest], 4, 0.5, 0.001)
        assert found[i] == generate(local, [rows[i]["input_ids"]], **ANSWERED)[0]
    assert [found[i] for i in range(6)] != plain


def test_neighbours_are_the_nearest_keys_and_keys_those_of_the_model_before_the_first_stage():
    """Equal to brute force with the pretrained model; later training has no influence."""
    method, model = after_stages()
    rows = prompts(8)
    pretrained = tiny_model().eval()

    def key(ids):
        with torch.no_grad():
            return pretrained.model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)

    stored = [
        key([t for t, y in zip(row["input_ids"], row["labels"], strict=True) if y == -100])
        for row in method.memory.rows
    ]
    for row, found in zip(rows, method.nearest(evaluation(model), rows), strict=True):
        distances = (torch.stack(stored) - key(row["input_ids"])).norm(dim=1)
        assert found == tuple(sorted(distances.argsort()[:5].tolist()))
    torch.testing.assert_close(method.keys, torch.stack(stored), rtol=1e-4, atol=1e-6)


def test_a_stored_prompt_finds_itself_and_tasks_find_their_own_rows():
    """Two tasks with letters of their own: nearly all neighbours are of the right task."""
    chance = random.Random(0)

    def rows(task):
        first = 5 + 25 * task
        ids = [[chance.randrange(first, first + 25) for _ in range(12)] for _ in range(30)]
        return [{"input_ids": i, "labels": [-100] * 11 + i[11:]} for i in ids]

    method, model = MbPA(neighbours=8), lora_model()
    for index in (1, 2):
        stage = tiny_stage(model, rows(index - 1), index)
        method.before_stage(stage)
        method.after_stage(stage)
    right = 0
    for task in range(2):
        asked = [{"input_ids": row["input_ids"][:-1]} for row in rows(task)]
        right += sum(
            method.memory.tasks[i] == task + 1 for near in method.nearest(evaluation(model), asked) for i in near
        )
    assert right / (60 * 8) > 0.9
    stored = [{"input_ids": row["input_ids"][:-1]} for row in method.memory.rows]
    assert all(i in near for i, near in enumerate(method.nearest(evaluation(model), stored)))


def test_rows_with_the_same_neighbours_share_one_adaptation():
    method, model = after_stages(neighbours=100)
    rows = prompts(5)
    assert [list(part) for part in method.at_test(evaluation(model), rows)] == [[0, 1, 2, 3, 4]]
    method, model = after_stages()
    parts = [list(part) for part in method.at_test(evaluation(model), [rows[0], rows[1], rows[0]])]
    assert parts in ([[0, 2], [1]], [[0, 1, 2]])


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("stop", [0, 2, None])
def test_the_weights_are_as_they_were_afterwards_and_when_it_is_closed_early(stop, mode):
    method, model = after_stages()
    model.train(mode)
    before = snapshot(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    parts = method.at_test(evaluation(model), prompts(5))
    changed = False
    for number, _ in enumerate(parts):
        changed |= not same(model, before)
        if number == stop:
            break
    parts.close()
    assert changed and same(model, before) and all(m.training == mode for m in model.modules())
    assert all(torch.all(p.grad == 1) for p in model.parameters() if p.requires_grad)


def test_neither_order_nor_company_of_rows_changes_the_adapted_losses():
    method, model = after_stages()
    rows = tiny_rows(6, seed=9)

    def losses(rows, batch_size=3):
        this = evaluation(model, method, batch_size=batch_size)
        found = {}
        for part in this.parts(rows):
            values, _ = token_losses(model, [rows[i] for i in part], batch_size=batch_size, pad_token_id=0)
            found |= {tuple(rows[i]["input_ids"]): value for i, value in zip(part, values, strict=True)}
        return found

    whole = losses(rows)
    assert losses(rows[::-1]) == pytest.approx(whole, rel=1e-5)
    assert losses(rows[:2]) == pytest.approx(
        {tuple(row["input_ids"]): whole[tuple(row["input_ids"])] for row in rows[:2]}, rel=1e-5
    )
    assert losses(rows, batch_size=1) == pytest.approx(whole, rel=1e-4)
    plain, _ = token_losses(model, rows, batch_size=3, pad_token_id=0)
    assert list(whole.values()) != pytest.approx(list(plain), rel=1e-3)


def test_without_steps_or_memory_all_rows_are_answered_at_once():
    method, model = after_stages(steps=0)
    assert list(method.at_test(evaluation(model), prompts(4))) == [range(4)]
    assert list(MbPA().at_test(evaluation(model), prompts(4))) == [range(4)]


def test_what_is_written_into_the_memory():
    everything, _ = after_stages(rows=40)
    assert len(everything.memory) == 80 and everything.keys.shape == (80, 16)
    half, _ = after_stages(rows=400, write_probability=0.5)
    assert 340 < len(half.memory) < 460
    method, _ = after_stages(3, rows=40, capacity=20)
    assert len(method.memory) == 20 and len(set(method.memory.tasks)) == 3
    nothing, model = after_stages(1, rows=3, write_probability=1e-9)
    assert len(nothing.memory) == 0 and list(nothing.at_test(evaluation(model), prompts(2))) == [range(2)]
    # Keys stay with their rows, whichever the memory gave up.
    expected = prompt_queries(tiny_model(), method.memory.rows, pad_rows, 4)
    torch.testing.assert_close(method.keys, expected, rtol=1e-4, atol=1e-6)


def test_every_nth_step_of_the_run_learns_from_as_many_rows_of_the_memory_too():
    """The gradient that is added is that of the mean loss over the replayed rows' tokens."""
    method, model = after_stages(replay=0.1)
    model.eval()
    stored = [tuple(row["input_ids"]) for row in method.memory.rows]
    replayed = []
    for index in range(40):
        stage = tiny_stage(model, tiny_rows(4), 3 if index < 24 else 4)
        step = Step(stage, index if index < 24 else index - 24, rows=6, micro_batches=2, logged=False)
        gradient = weights(model).zeros_like()
        values = method.after_backward(step, gradient)
        if not values:
            assert all(not t.any() for t in gradient)
            continue
        replayed.append(index)
        assert values == {"mbpa/replayed": 6.0}
        rows = method.memory.sample(6, step.random("mbpa"))
        assert {tuple(row["input_ids"]) for row in rows} <= set(stored)
        batch = pad_rows(rows)
        labels = batch.pop("labels")
        loss = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        trained = [p for p in model.parameters() if p.requires_grad]
        for t, expected in zip(gradient, torch.autograd.grad(loss, trained), strict=True):
            torch.testing.assert_close(t, expected, rtol=1e-4, atol=1e-6)
    assert replayed == [9, 19, 29, 39]
    for idle in (after_stages(replay=0)[0], MbPA(replay=1)):
        assert idle.after_backward(step, gradient) == {}


def test_state_round_trip(tmp_path):
    method, model = after_stages(3, rows=20, capacity=30, write_probability=0.8)
    save_states([method], tmp_path)
    other = MbPA(**method.options.model_dump())
    load_states([other], tmp_path, model)
    one, two = method.state(), other.state()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key], key
    for this in (method, other):
        this.after_stage(tiny_stage(model, tiny_rows(20, seed=4), 4))
    assert torch.equal(method.keys, other.keys) and method.memory.rows == other.memory.rows
    assert method.nearest(evaluation(model), prompts(4)) == other.nearest(evaluation(model), prompts(4))


@pytest.mark.parametrize("other", ["o_lora", "seq_lora_merge"])
def test_methods_that_exchange_the_trained_weights_are_refused(other):
    with pytest.raises(ConfigError, match="cannot be applied together"):
        build([("mbpa", {}), (other, {})])


def test_in_the_drop_in_trainer_each_call_of_train_fills_the_memory(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=4, logging_steps=1, save_strategy="no"
    )
    model = lora_model()
    method = {"name": "mbpa", "replay": 0.5, "neighbours": 3, "steps": 2}
    trainer = ContinualTrainer(model=model, args=args, method=method, data_collator=Collator(0))
    for seed in (1, 2):
        trainer.train_dataset = tiny_rows(16, seed)
        trainer.train()
    [method] = trainer.methods
    assert method.memory.tasks == [1] * 16 + [2] * 16 and method.steps == 8
    assert any("term/mbpa/replayed" in line for line in trainer.state.log_history)
    assert sorted(i for part in method.at_test(evaluation(model), prompts(4)) for i in part) == [0, 1, 2, 3]


def run(folder, output, method, tuner="full", **training):
    config = tiny_config(folder, method=method, tuner=tuner, output=str(folder / output))
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": 2} | training
    holdfast.runner.run.run(config, Progress(quiet=True))
    return folder / output


def responses(path):
    return {
        str(file.relative_to(path)): file.read_text() for file in sorted(path.glob("stages/*/responses/**/*.jsonl"))
    }


def saved(path, kind):
    files = sorted(path.glob(f"stages/*/{kind}/*.safetensors"))
    return {f"{file.relative_to(path)}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_switched_off_it_is_sequential_and_adaptation_alone_leaves_training_as_it_is(tmp_path):
    plain = run(tmp_path, "plain", "sequential")
    off = run(tmp_path, "off", {"name": "mbpa", "steps": 0, "replay": 0})
    local = run(tmp_path, "local", {"name": "mbpa", "steps": 3, "learning_rate": 0.5, "replay": 0})
    one, two, three = (saved(path, "model") for path in (plain, off, local))
    assert one.keys() == two.keys() == three.keys()
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)
    assert responses(off) == responses(plain) != responses(local)


def test_a_run_that_is_continued_from_its_files_is_the_unbroken_one(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    method = {"name": "mbpa", "steps": 2, "neighbours": 4, "replay": 0.25, "capacity": 30}
    unbroken = run(tmp_path, "unbroken", method, save_every=4)
    evaluate = holdfast.runner.measure.evaluate_task
    calls = []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == 4:  # the second task after stage 1
            raise Killed
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.measure, "evaluate_task", dying)
        with pytest.raises(Killed):
            run(tmp_path, "broken", method, save_every=4)
    broken = run(tmp_path, "broken", method, save_every=4)
    assert responses(broken) == responses(unbroken)
    for kind in ("model", "method"):
        one, two = saved(broken, kind), saved(unbroken, kind)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)
