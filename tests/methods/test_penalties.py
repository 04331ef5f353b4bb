"""EWC, SI and MAS against plain loops, finite differences and hand calculation."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from holdfast import ContinualTrainer
from holdfast.api.stage import Step
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import gradients, weights
from holdfast.errors import ConfigError
from holdfast.methods.ewc import EWC, diagonal_fisher, draw
from holdfast.methods.mas import MAS, sensitivity
from holdfast.methods.si import SI
from holdfast.training.method_state import load_states, save_states
from support.shown import recorded
from support.tiny import pad_rows, tiny_model, tiny_rows, tiny_stage

PENALTIES = {
    "ewc": (EWC, {"samples": 4, "strength": 100.0}),
    "ewc online": (EWC, {"samples": 4, "strength": 100.0, "variant": "online", "gamma": 0.5}),
    "ewc model": (EWC, {"samples": 4, "strength": 100.0, "fisher": "model"}),
    "si": (SI, {"strength": 1.0}),
    "mas": (MAS, {"samples": 4, "strength": 1e-2}),
}
penalties = pytest.mark.parametrize("kind", PENALTIES)
methods = pytest.mark.parametrize("kind", ["ewc", "si", "mas"])


def made(kind, **changes):
    cls, options = PENALTIES[kind]
    return cls(**options | changes)


def answer_nll(model, row):
    """- log p(answer | prompt), token by token."""
    log_p = F.log_softmax(model(input_ids=torch.tensor([row["input_ids"]])).logits[0], dim=-1)
    return -sum(log_p[s - 1, row["labels"][s]] for s in range(1, len(row["labels"])) if row["labels"][s] != -100)


def squared_length(model, row):
    """Mean over the places that predict a supervised token of the squared length of the logits."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    places = [s - 1 for s in range(1, len(row["labels"])) if row["labels"][s] != -100]
    return sum((logits[place] ** 2).sum() for place in places) / len(places)


def mean_loss(model, rows):
    batch = pad_rows(rows)
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def shift_weights(model, scale, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))


def a_step(stage, index=0):
    return Step(stage, index, rows=4, micro_batches=2, logged=True)


def assert_close(shards, expected, **tolerance):
    assert shards.tensors.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(shards.tensors[name].double(), value.double(), **tolerance)


# --- EWC: the Fisher matrix


def test_fisher_equals_a_plain_per_sample_loop():
    model, rows = tiny_model(), tiny_rows(6)
    show, told = recorded()
    fisher = diagonal_fisher(replace(tiny_stage(model, rows), show=show), rows)
    assert [done for _, done, total in told if total == 6] == [1, 2, 3, 4, 5, 6]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        answer_nll(model, row).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad**2 / len(rows)
    assert_close(fisher, expected, rtol=1e-4, atol=1e-10)
    assert all(value.max() > 0 for value in expected.values())


def test_fisher_is_not_that_of_the_mean_gradient():
    """Squaring the gradient of a batch's mean is the published mistake; it gives something else."""
    model, rows = tiny_model(), tiny_rows(6)
    fisher = diagonal_fisher(tiny_stage(model, rows), rows)
    (sum(answer_nll(model, row) for row in rows) / len(rows)).backward()
    name, p = max(model.named_parameters(), key=lambda item: item[1].numel())
    assert (fisher.tensors[name].sum() / (p.grad**2).sum()) > 1.5


class Bigram(nn.Module):
    """Logits are a row of a table; unlike transformers' models it cannot choose places for its head."""

    def __init__(self, vocabulary):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary))

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def test_fisher_from_labels_by_hand():
    """d log p(y | x) / d table[x] = onehot(y) - p(. | x); the answer 3, 1 follows 0 and then 3."""
    model, row = Bigram(4), {"input_ids": [2, 0, 3, 1], "labels": [-100, -100, 3, 1]}
    fisher = diagonal_fisher(tiny_stage(model, [row]), [row]).tensors["table"]
    p = model.table.softmax(-1).detach()
    expected = torch.zeros(4, 4)
    expected[0] = (torch.eye(4)[3] - p[0]) ** 2
    expected[3] = (torch.eye(4)[1] - p[3]) ** 2
    torch.testing.assert_close(fisher, expected)


def test_fisher_from_the_model_is_its_expectation():
    """E (onehot(y) - p)^2 = p (1 - p) for each place, and places add up, since the mean score of each is zero."""
    model, row = Bigram(4), {"input_ids": [0, 2, 0, 1], "labels": [-100, 2, 0, 1]}
    rows, p = [row] * 1500, model.table.softmax(-1).detach()
    stage = tiny_stage(model, rows)
    fisher = diagonal_fisher(stage, rows, stage.random("answers")).tensors["table"]
    expected = torch.zeros(4, 4)
    expected[0] = 2 * p[0] * (1 - p[0])
    expected[2] = p[2] * (1 - p[2])
    torch.testing.assert_close(fisher, expected, rtol=0.1, atol=0.015)


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([0.0, -1.0, float("-inf"), 2.0, 0.5]).repeat(8000, 1)
    tokens = draw(logits, tiny_stage(None, []).random("draw"))
    frequency = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(frequency, logits[0].softmax(-1), rtol=0, atol=0.02)
    assert frequency[2] == 0


def test_answers_are_drawn_again_alike_and_differ_from_the_labels():
    model, rows = tiny_model(), tiny_rows(4)
    found = []
    for options in ({"fisher": "model"}, {"fisher": "model"}, {"fisher": "labels"}):
        ewc = EWC(**options)
        ewc.after_stage(tiny_stage(model, rows))
        found.append(ewc.importance.tensors["model.norm.weight"])
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


# --- the penalty: one form for the sum of all terms


def three_stages(method):
    """The terms of three stages, and the weights after each; the model then moves on."""
    model, importances, anchors = tiny_model(), [], []
    for t in (1, 2, 3):
        rows = tiny_rows(4, seed=t)
        stage = tiny_stage(model, rows, index=t)
        importances.append(diagonal_fisher(stage, rows) if isinstance(method, EWC) else sensitivity(stage, rows))
        anchors.append(weights(model).copy())
        method.after_stage(stage)
        shift_weights(model, 0.05, seed=t)
    return model, importances, anchors


def brute_force(strength, terms, theta):
    """strength / 2 * sum of <importance, (theta - anchor)^2>, and its gradient, in float64, term by term."""
    theta = {name: t.double().requires_grad_() for name, t in theta.tensors.items()}
    value = 0.0
    for factor, importance, anchor in terms:
        for name, t in theta.items():
            distance = t - anchor.tensors[name].double()
            value = value + factor * strength / 2 * (importance.tensors[name].double() * distance**2).sum()
    return value.item(), dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True))


@pytest.mark.parametrize("kind", ["separate", "online", "mas"])
def test_penalty_and_gradient_equal_brute_force_over_three_tasks(kind):
    method = {
        "separate": EWC(strength=3.0, samples=4),
        "online": EWC(strength=3.0, samples=4, variant="online", gamma=0.6),
        "mas": MAS(strength=3.0, samples=4),
    }[kind]
    model, importances, anchors = three_stages(method)
    factors = [0.36, 0.6, 1.0] if kind == "online" else [1.0, 1.0, 1.0]
    terms = list(zip(factors, importances, anchors if kind == "separate" else [anchors[-1]] * 3, strict=True))
    value, gradient = brute_force(3.0, terms, weights(model))
    assert method.penalty(weights(model)) == pytest.approx(value, rel=1e-4) and value > 0
    assert_close(method.penalty_gradient(weights(model)), gradient, rtol=1e-3, atol=1e-6 * value)


def test_online_and_separate_differ_only_from_the_second_task_on():
    separate, online = EWC(samples=4), EWC(samples=4, variant="online")
    model = three_stages(separate)[0]
    three_stages(online)
    assert separate.penalty(weights(model)) != pytest.approx(online.penalty(weights(model)), rel=1e-2)
    one, other, stage = EWC(samples=4), EWC(samples=4, variant="online"), tiny_stage(tiny_model(), tiny_rows(4))
    one.after_stage(stage)
    other.after_stage(stage)
    assert one.penalty(weights(model)) == other.penalty(weights(model)) > 0


def test_gradient_is_the_slope_of_the_penalty_by_finite_differences():
    ewc = EWC(strength=3.0, samples=4)
    model = three_stages(ewc)[0].double()
    gradient = ewc.penalty_gradient(weights(model))
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        direction, epsilon = torch.randn_like(p), 1e-2
        with torch.no_grad():
            p.add_(epsilon * direction)
            above = ewc.penalty(weights(model))
            p.sub_(2 * epsilon * direction)
            below = ewc.penalty(weights(model))
            p.add_(epsilon * direction)
        slope = float((gradient.tensors[name] * direction).sum())
        assert gradient.tensors[name].dtype == torch.float64
        assert (above - below) / (2 * epsilon) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_a_weight_without_importance_is_free_and_divides_nothing_by_zero():
    method = EWC(strength=2.0)
    for importance, anchor in (([0.0, 1.0, 0.0], [1.0, 1.0, 1.0]), ([0.0, 3.0, 2.0], [5.0, 5.0, 5.0])):
        method.add_term(*(Shards({"w": torch.tensor(values)}) for values in (importance, anchor)))
    theta = Shards({"w": torch.tensor([9.0, 4.0, 6.0])})
    assert method.penalty_gradient(theta).tensors["w"].tolist() == [0.0, 2 * (1 * 3 - 3 * 1), 2 * 2 * 1]
    assert method.penalty(theta) == pytest.approx(1 * 9 + 3 * 1 + 2 * 1)


@penalties
def test_gradient_is_added_once_to_what_is_accumulated(kind):
    model, rows = tiny_model(), tiny_rows(4)
    method, stage = made(kind), tiny_stage(model, rows)
    learn(method, stage, steps=2)
    stage = tiny_stage(model, rows, index=2)
    method.before_stage(stage)
    shift_weights(model, 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    values = method.after_backward(a_step(stage), gradients(model))
    expected = method.penalty_gradient(weights(model))
    assert expected.dot(expected) > 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 1 + expected.tensors[name])
    assert values == {method.name: method.penalty(weights(model))} and values[method.name] > 0


@penalties
def test_what_is_kept_does_not_grow_with_the_tasks(kind):
    model, sizes = tiny_model(), []
    method = made(kind)
    for t in (1, 2, 3):
        learn(method, tiny_stage(model, tiny_rows(4, seed=t), index=t), steps=2)
        tensors = [value for value in method.state().values() if isinstance(value, torch.Tensor)]
        sizes.append(sum(t.numel() for t in tensors))
    assert sizes == [2 * sum(p.numel() for p in model.parameters())] * 3


@penalties
def test_importance_is_that_of_the_trainable_weights_alone(kind):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5))
    method, stage = made(kind), tiny_stage(model, tiny_rows(4))
    learn(method, stage, steps=3)
    assert method.importance.tensors.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in method.importance.tensors)
    assert all(t.min() >= 0 and t.isfinite().all() for t in method.importance)
    assert all(t.max() > 0 for t in method.importance)


# --- MAS


def test_mas_importance_equals_a_plain_per_sample_loop():
    model, rows = tiny_model(), tiny_rows(6)
    found = sensitivity(tiny_stage(model, rows), rows)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        squared_length(model, row).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.abs() / len(rows)
    assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(value.max() > 0 for value in expected.values())


def test_mas_importance_is_the_slope_of_the_squared_length_by_finite_differences():
    model, [row] = tiny_model().double(), tiny_rows(1)
    found = sensitivity(tiny_stage(model, [row]), [row])
    for name, p in model.named_parameters():
        place, epsilon = int(found.tensors[name].argmax()), 1e-3  # Llama's norms compute in float32
        flat, lengths = p.data.view(-1), []
        for change in (epsilon, -2 * epsilon):
            flat[place] += change
            with torch.no_grad():
                lengths.append(squared_length(model, row).item())
        flat[place] += epsilon
        slope = abs(lengths[0] - lengths[1]) / (2 * epsilon)
        assert found.tensors[name].view(-1)[place].item() == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_mas_asks_for_no_label():
    model, rows = tiny_model(), tiny_rows(4)
    other = [row | {"labels": [y if y == -100 else 3 for y in row["labels"]]} for row in rows]
    one, two = (sensitivity(tiny_stage(model, r), r) for r in (rows, other))
    assert all(torch.equal(t, two.tensors[name]) for name, t in one.tensors.items())
    three = diagonal_fisher(tiny_stage(model, other), other), diagonal_fisher(tiny_stage(model, rows), rows)
    assert not torch.equal(three[0].tensors["model.norm.weight"], three[1].tensors["model.norm.weight"])


# --- SI


def learn(method, stage, steps, rate=0.05, clip=None, optimizer=torch.optim.SGD, spy=None):
    """Train without a Trainer, calling a method as the trainer does; ``spy`` sees every step's loss."""
    model = stage.model
    method.before_stage(stage)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=rate)
    for index in range(steps):
        optimizer.zero_grad()
        loss = mean_loss(model, stage.rows)
        loss.backward()
        if spy:
            spy(model, loss.item())
        method.after_backward(a_step(stage, index), gradients(model))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        method.after_step(a_step(stage, index), weights(model))
    method.after_stage(stage)


def test_si_path_integral_sums_to_the_loss_decrease_to_first_order():
    gaps = []
    for rate, steps in ((0.04, 25), (0.02, 50), (0.01, 100)):
        model, rows = tiny_model().eval(), tiny_rows(6)
        start, si, stage = mean_loss(model, rows).item(), SI(), tiny_stage(model, rows)
        si.after_stage = lambda stage: None  # keeps the path
        learn(si, stage, steps, rate)
        decrease = start - mean_loss(model, rows).item()
        gaps.append(sum(float(t.double().sum()) for t in si.path) / decrease - 1)
        assert decrease > 0.1
    assert abs(gaps[2]) < 0.03
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2) and gaps[1] / gaps[2] == pytest.approx(2, rel=0.2)


def test_si_importance_equals_a_plain_loop_under_adam_clipping_and_its_own_penalty():
    """omega uses the gradient of the loss, neither clipped nor with the penalty's."""
    model, si, xi = tiny_model(), SI(strength=5.0, xi=0.01), 0.01
    names = [name for name, _ in model.named_parameters()]
    omega = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for index in (1, 2, 3):
        record = []

        def spy(model, loss, record=record):
            record.append([(p.detach().double().clone(), p.grad.double().clone()) for p in model.parameters()])

        learn(si, tiny_stage(model, tiny_rows(6, seed=index), index), 8, 5e-2, 0.1, torch.optim.Adam, spy)
        ends = [p.detach().double().clone() for p in model.parameters()]
        for i, name in enumerate(names):
            trajectory = [entry[i][0] for entry in record] + [ends[i]]
            path = sum(-entry[i][1] * (trajectory[s + 1] - trajectory[s]) for s, entry in enumerate(record))
            distance = trajectory[-1] - trajectory[0]
            omega[name] = torch.clamp(omega[name] + path / (distance**2 + xi), min=0)
        assert_close(si.importance, omega, rtol=1e-3, atol=1e-6)
        assert_close(si.anchor, dict(zip(names, ends, strict=True)), rtol=0, atol=0)
    assert all(value.max() > 0 for value in omega.values())


def test_si_importance_by_hand_adds_up_and_stays_at_zero_where_it_would_push_away():
    model, si = nn.Linear(3, 1, bias=False), SI(xi=0.5)
    for path, move, expected in (
        ([-1.0, 3.0, 2.0], [1.0, 1.0, 0.0], [0.0, 3 / 1.5, 2 / 0.5]),
        ([1.0, -9.0, -0.5], [0.5, 0.0, 0.0], [1 / 0.75, 0.0, 2 / 0.5 - 0.5 / 0.5]),
    ):
        si.before_stage(tiny_stage(model, []))
        model.weight.data += torch.tensor(move)
        si.path = Shards({"weight": torch.tensor([path])})
        si.after_stage(tiny_stage(model, []))
        torch.testing.assert_close(si.importance.tensors["weight"], torch.tensor([expected]))


# --- in a trainer


def trainer(model, method, folder, rows, save_steps=100, **changes):
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=save_steps,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    return ContinualTrainer(
        model=model, args=args, train_dataset=rows, data_collator=pad_rows, method=method, **changes
    )


def logged(trainer, name):
    return [entry[f"term/{name}"] for entry in trainer.state.log_history if f"term/{name}" in entry]


def two_stages(method, folder, **changes):
    """The trainer after two stages, and the weights after the first; a folder holds the method's state at that time."""
    model = tiny_model(attention_dropout=0.1)
    made = trainer(model, method, folder, tiny_rows(12, seed=1), **changes)
    made.train()
    between = copy.deepcopy(model.state_dict())
    made.train_dataset = tiny_rows(12, seed=2)
    save_states(made.methods, folder / "between")
    made.train()
    return made, between


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    return two_stages("sequential", tmp_path_factory.mktemp("sequential"))


@methods
def test_strength_zero_changes_nothing(kind, sequential, tmp_path):
    one, _ = sequential
    two, _ = two_stages(made(kind, strength=0.0), tmp_path)
    assert [e.get("loss") for e in one.state.log_history] == [e.get("loss") for e in two.state.log_history]
    for name, p in one.model.named_parameters():
        assert torch.equal(p, two.model.get_parameter(name)), name
    assert not logged(two, two.methods[0].name)


@methods
def test_penalty_is_logged_and_keeps_important_weights_near(kind, sequential, tmp_path):
    free, start = sequential
    kept, before = two_stages(made(kind, strength=1e4), tmp_path)
    [method] = kept.methods
    values = logged(kept, method.name)
    assert len(values) == 6 and values[0] == 0 and values[-1] > 0
    load_states([method], tmp_path / "between", kept.model)
    assert all(torch.equal(before[name], t) for name, t in start.items()), "the first stage had no penalty yet"
    assert method.penalty(weights(kept.model)) < 0.5 * method.penalty(weights(free.model))


@methods
def test_a_stage_that_is_continued_ends_as_the_unbroken_one(kind, tmp_path):
    """Stage 2 continues from its checkpoint with a new model and a new method, which load what was saved."""
    unbroken, between = two_stages(made(kind), tmp_path, save_steps=3)
    model = tiny_model(attention_dropout=0.1)
    model.load_state_dict(between)
    method = made(kind)
    load_states([method], tmp_path / "between", model)
    again = trainer(model, method, tmp_path, tiny_rows(12, seed=2), stage_index=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(logged(again, method.name)) == 6
    for name, p in unbroken.model.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    one, two = unbroken.methods[0].state(), method.state()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]


@penalties
def test_state_survives_a_restart(kind, tmp_path):
    model, method, other = tiny_model(), made(kind), made(kind)
    for index in (1, 2):
        learn(method, tiny_stage(model, tiny_rows(6, seed=index), index), 2)
    save_states([method], tmp_path)
    load_states([other], tmp_path, model)
    shift_weights(model, 0.1)
    assert method.penalty(weights(model)) == other.penalty(weights(model)) > 0
    save_states([made(kind)], tmp_path)
    load_states([other], tmp_path, model)
    assert other.importance is None and other.declares(tiny_stage(model, [])) == ()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (EWC, {"gamma": 0.9}, "gamma: would change nothing.*variant online"),
        (EWC, {"variant": "online", "gamma": 1.1}, "gamma"),
        (EWC, {"fisher": "sampled"}, "fisher"),
        (EWC, {"strength": -1}, "strength"),
        (SI, {"xi": 0}, "xi"),
        (SI, {"samples": 3}, "samples"),
        (MAS, {"samples": 0}, "samples"),
    ],
)
def test_options_that_are_wrong_or_unused_are_refused(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        cls(**options)
