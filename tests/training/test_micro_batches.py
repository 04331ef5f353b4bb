"""A stage moves the weights alike, however the rows of a step are divided into micro-batches.

Prompts are not supervised, and lengths of prompts and answers have nothing to do with each other, so that a micro-batch
with many tokens may have few supervised ones. All is in float64: what differs is no rounding.
"""

from __future__ import annotations

import json
import random

import pytest
import torch

from holdfast.config.section import Named
from holdfast.methods import build
from holdfast.training.trainer import ContinualTrainer
from holdfast.tuners import build as build_tuner
from support.guards import GENERAL, TRAINED, case, tuner_of, with_paths
from support.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from support.trained import trained

LOSSES = {
    "ce": {"loss": "ce"},
    "kl": {"loss": "kl"},
    "reverse kl": {"loss": "kl", "direction": "reverse", "temperature": 2.0},
    "l1": {"loss": "l1"},
    "l2": {"loss": "l2", "layer": 1},
    "margin": {"loss": "margin", "multiple": 0.3},
    "margin over all": {"loss": "margin", "multiple": 0.3, "reduction": "mean"},
    "l2 and ce": {"loss": "l2", "ce_weight": 0.5},
}
ROWS = 16


def rows_of(seed: int) -> list[dict[str, list[int]]]:
    """Long prompts with short answers, and the other way round."""
    chance = random.Random(seed)
    rows = []
    for _ in range(ROWS):
        prompt, answer = chance.choice(((12, 1), (2, 7), (5, 2), (1, 9)))
        ids = [chance.randrange(3, VOCABULARY) for _ in range(prompt + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def movement(folder, method, options, micro, tuner="full"):
    """How far the trained weights move in the second stage, [parameters]."""
    tuner = build_tuner(Named.model_validate(tuner if isinstance(tuner, dict) else {"name": tuner}))
    torch.manual_seed(0)
    model = tuner.prepare(tiny_model()).double()
    methods = [*build([(method, options)]), *filter(None, [tuner.companion()])]
    for stage in (1, 2):
        start = vector(model)
        trained(
            folder,
            ContinualTrainer,
            rows=rows_of(stage),
            model=model,
            method=methods,
            stage_index=stage,
            processing_class=tiny_tokenizer(),
            args={
                "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": 8 // micro,
                "max_grad_norm": 0,
                "optim": "sgd",
                "optim_args": "momentum=0.9" if any(one.needs_momentum for one in methods) else None,
                "learning_rate": 0.3,
            },
        )
    return vector(model) - start if vector(model).shape == start.shape else vector(model)


def vector(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def assert_alike(folder, method, options, tuner="full"):
    whole, half = (movement(folder / str(micro), method, options, micro, tuner) for micro in (8, 4))
    assert whole.norm() > 0
    assert (whole - half).norm() <= 1e-6 * whole.norm(), float((whole - half).norm() / whole.norm())


@pytest.mark.parametrize(
    ("source", "loss"),
    [("past", loss) for loss in LOSSES] + [("current", loss) for loss in ("kl", "l1", "l2", "l2 and ce")],
)
def test_every_rehearsal_loss(source, loss, tmp_path):
    share = {"ratio": 0.5} if source == "past" else {}
    assert_alike(tmp_path, "rehearsal", {"source": source, "weight": 3.0} | LOSSES[loss] | share)


@pytest.mark.parametrize("name", TRAINED)
def test_every_method(name, tmp_path):
    (tmp_path / "general.txt").write_text(GENERAL)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    assert_alike(tmp_path, name, with_paths(case(name).options, tmp_path), tuner_of(name))
