"""WiSE-FT and LiNeS: the final weights against each formula, tensor by tensor, and the coefficient that dev chooses."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.lines import LiNeS
from holdfast.methods.parts.interpolation import choose
from holdfast.methods.wise_ft import WiSEFT
from holdfast.runner.run import run
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from holdfast.tuners.lora_factors import factors, scalings
from support.lora import lora_model, shake
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage
from support.trained import trained

DEPTH = 4


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def move(model, seed=1):
    """As if a stage had trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))


def factor(name, method):
    """lambda of a tensor, read off its name."""
    alpha = method.options.alpha
    if method.name == "wise_ft":
        return alpha
    beta = 1 - alpha if method.options.beta is None else method.options.beta
    block = next((i for i in range(DEPTH) if f".layers.{i}." in name), None)
    return alpha if block is None else alpha + beta * block / (DEPTH - 1)


METHODS = [lambda: WiSEFT(alpha=0.3), lambda: LiNeS(alpha=0.1), lambda: LiNeS(alpha=0.2, beta=0.5)]


@pytest.mark.parametrize("make", METHODS)
def test_each_tensor_of_a_full_model_is_the_formula(make):
    method, model = make(), tiny_model(num_hidden_layers=DEPTH)
    stage = tiny_stage(model, [])
    start = values(model)
    method.before_stage(stage)
    move(model)
    end = values(model)
    method.final_weights(stage)
    for name, p in model.named_parameters():
        share = factor(name, method)
        torch.testing.assert_close(p.detach(), (1 - share) * start[name] + share * end[name], msg=name)
    method_factors = {factor(name, method) for name in start}
    assert len(method_factors) == (1 if method.name == "wise_ft" else DEPTH)


def updates(model):
    """scaling * B A of every layer, [out, in]."""
    scaling, found = scalings(model), factors(model)
    return {key[:-7]: scaling[key] * found[key] @ found[f"{key[:-7]}.lora_A"] for key in scaling}


@pytest.mark.parametrize("make", METHODS)
def test_the_update_of_a_lora_layer_is_interpolated_exactly_in_the_first_stage(make):
    method, model = make(), lora_model()
    stage = tiny_stage(model, [])
    method.before_stage(stage)
    shake(model, seed=1)
    end = updates(model)
    method.final_weights(stage)
    depth = model.config.num_hidden_layers
    for layer, found in updates(model).items():
        share = method.options.alpha
        if method.name == "lines":
            beta = 1 - share if method.options.beta is None else method.options.beta
            share += beta * int(layer.split(".layers.")[1].split(".")[0]) / (depth - 1)
        torch.testing.assert_close(found, share * end[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_in_a_later_stage_the_update_is_as_near_as_its_rank_allows(alpha):
    method, model = WiSEFT(alpha=alpha), lora_model()
    stage = tiny_stage(model, [])
    shake(model, seed=1)
    before, start = updates(model), values(model)
    method.before_stage(stage)
    shake(model, seed=2, scale=0.1)
    after, end = updates(model), values(model)
    method.final_weights(stage)
    halfway = {name: (1 - alpha) * start[name] + alpha * end[name] for name in start}
    for layer, found in updates(model).items():
        wanted = (1 - alpha) * before[layer] + alpha * after[layer]
        best = torch.linalg.svdvals(wanted.double())[3:].norm()
        a, b = (halfway[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        by_factors = (scalings(model)[f"{layer}.lora_B"] * b @ a - wanted).norm()
        assert best <= (found - wanted).double().norm() * 1.0001 and (found - wanted).norm() <= 1.02 * best + 1e-5
        assert (found - wanted).norm() < by_factors


@pytest.mark.parametrize("kind", [tiny_model, lora_model])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_exact(kind, alpha):
    method, model = WiSEFT(alpha=alpha), kind()
    stage = tiny_stage(model, [])
    ends = [values(model)]
    method.before_stage(stage)
    move(model)
    ends.append(values(model))
    method.final_weights(stage)
    assert all(torch.equal(t, ends[int(alpha)][name]) for name, t in values(model).items())


def plain_losses(model, rows):
    """Of each row by itself, in plain torch."""
    found = []
    with torch.no_grad():
        for row in rows:
            batch = pad_rows([row])
            labels = batch.pop("labels")[0]
            nll = F.cross_entropy(model.eval()(**batch).logits[0, :-1], labels[1:], reduction="sum")
            found.append((float(nll), int((labels[1:] != -100).sum())))
    return found


def test_the_losses_of_a_stage_are_those_of_each_row_alone():
    model, rows = tiny_model(attention_dropout=0.5), tiny_rows(11)
    rows[3] = rows[3] | {"labels": [-100] * len(rows[3]["labels"])}
    model.train()
    nats, tokens = tiny_stage(model, rows).losses(rows)
    assert model.training
    expected = plain_losses(model, rows)
    assert nats == pytest.approx([loss for loss, _ in expected], rel=1e-5, abs=1e-6)
    assert tokens == [count for _, count in expected] and tokens[3] == 0


@pytest.mark.parametrize(
    ("losses", "gain", "chosen"),
    [
        ([1.5, 1.1, 1.0, 1.2], 1.0, 2),  # the lowest
        ([1.5, 1.1, 1.0, 1.2], 0.9, 1),  # 1.1 keeps 0.9 of the fall from 2 to 1
        ([1.5, 1.1, 1.0, 1.2], 0.5, 0),
        ([2.5, 2.2, 2.4], 0.5, 1),  # nothing was gained
        ([1.0, 1.0], 1.0, 0),
    ],
)
def test_the_smallest_value_that_keeps_the_gain_is_chosen(losses, gain, chosen):
    assert choose(2.0, losses, gain) == chosen


def test_a_trainers_eval_dataset_chooses(tmp_path):
    """Against the losses of the interpolated weights, each measured in plain torch."""
    method = {"name": "wise_ft", "alpha": [0.25, 0.5, 1.0], "gain": 0.4}
    rows, dev = tiny_rows(24), tiny_rows(24)[:6]
    start = tiny_model()
    end = trained(tmp_path / "plain", rows=rows, args={"num_train_epochs": 8}).model
    losses = []
    for alpha in (0.0, 0.25, 0.5, 1.0):
        model = tiny_model()
        with torch.no_grad():
            for p, a, b in zip(model.parameters(), start.parameters(), end.parameters(), strict=True):
                p.copy_((1 - alpha) * a + alpha * b)
        pairs = plain_losses(model, dev)
        losses.append(sum(loss for loss, _ in pairs) / sum(count for _, count in pairs))
    before, *rest = losses
    needed = before - 0.4 * (before - min(rest))
    expected = next(alpha for alpha, loss in zip((0.25, 0.5, 1.0), rest, strict=True) if loss <= needed)
    ours = trained(tmp_path, rows=rows, args={"num_train_epochs": 8}, method=method, eval_dataset=dev)
    assert ours.methods[0].chosen == [expected] and expected < 1
    for p, a, b in zip(ours.model.parameters(), start.parameters(), end.parameters(), strict=True):
        torch.testing.assert_close(p, (1 - expected) * a + expected * b)


def dev_config(folder, **changes):
    config = tiny_config(folder, method={"name": "lines", "alpha": [0.0, 0.5, 1.0]}) | changes
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": 2}
    return config


def test_a_run_chooses_by_the_eval_split_of_each_task_and_says_what(tmp_path):
    config = dev_config(tmp_path)
    with pytest.raises(ConfigError, match=r"chooses by the dev split of each task, and task 'red' has none; give it"):
        prepare(resolve(load_config(config)))
    for name in ("red", "green"):
        task = tmp_path / "tasks" / name
        (task / "eval.json").write_text(json.dumps(json.loads((task / "train.json").read_text())[:5]))
    run(config, Progress(quiet=True))
    for stage, count in (("01-red", 1), ("02-green", 2)):
        [file] = (tmp_path / "run" / "stages" / stage / "method").glob("lines.json")
        chosen = json.loads(file.read_text())["chosen"]
        assert len(chosen) == count and set(chosen) <= {0.0, 0.5, 1.0}
    with pytest.raises(ConfigError, match=r"evaluation.split: dev measures on the rows that method lines chooses by"):
        prepare(resolve(load_config(dev_config(tmp_path, evaluation={"split": "dev"}))))


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="gain: would change nothing, since alpha is one value"):
        build([("wise_ft", {"gain": 0.5})])
    with pytest.raises(ConfigError, match="alpha"):
        build([("wise_ft", {"alpha": 1.5})])
    with pytest.raises(ConfigError, match="cannot be applied together: it exchanges the adapter in each stage"):
        build([("seq_lora_merge", {}), ("wise_ft", {})])
    with pytest.raises(ConfigError, match=r"has none; give the task one .* or one value, such as alpha: 0.5"):
        trained(tmp_path, method={"name": "wise_ft", "alpha": [0.1, 0.5]})
