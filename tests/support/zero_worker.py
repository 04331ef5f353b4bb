"""Trains a tiny model under plain transformers and DeepSpeed, changing gradients and weights on the way, for test_zero.

usage: [torchrun --nproc-per-node N] zero_worker.py FOLDER [ENGINE ...]: trains with each engine, or with none, from
the start, and leaves weights and optimizer state in FOLDER/ENGINE.pt. Where FOLDER/before.pt is, it starts from that.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from holdfast.data.collate import Collator
from holdfast.engines.pieces import full, layout_of, layout_of_model
from holdfast.engines.process import Process
from holdfast.engines.zero.engine import attach, release
from holdfast.engines.zero.profile import DEEPSPEED, begin
from support.tiny import tiny_model, tiny_rows

BATCH, STEPS = 12, 2  # divisible by 1, 2 and 3 processes with 2 micro-batches each
ROWS = tiny_rows(2 * BATCH * STEPS)
OTHER = Collator(0)(tiny_rows(4, seed=1))


class Changing(Trainer):
    """Takes a fixed direction out of each gradient, adds another loss's gradient, and moves the weights after steps."""

    engine: str | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.engine is None and self.accelerator.gradient_state.sync_gradients:
            self.change_gradients()
        return loss

    def change_gradients(self) -> None:
        parameters = trainable(self.model)
        gradients = {name: layout_of(p).gradient(p) for name, p in parameters.items()}
        fixed = directions(parameters)
        dot, norm = (total(parameters, other, fixed) for other in (gradients, fixed))
        added = other_gradient(self.model, parameters)
        for name, g in gradients.items():
            g.sub_(fixed[name], alpha=dot / norm).add_(added[name].view_as(g))


class Follow(TrainerCallback):
    """Hooks into the engine, and changes the weights."""

    def __init__(self, trainer: Changing, before: Path):
        self.trainer, self.before = trainer, before

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.engine is not None:
            attach(trainer.model_wrapped, trainer.change_gradients)
        if self.before.exists():
            saved, parameters = torch.load(self.before, weights_only=True), trainable(trainer.model)
            for name, p in parameters.items():
                layout_of(p).weight(p).copy_(take(p, saved["weights"][name]))
            layout_of_model(trainer.model).sync_weights(trainer.model)
            optimizer = torch_optimizer(trainer)
            names = {id(p): name for name, p in parameters.items()}
            ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(ordered))}
            for key, t in saved["state"].items():
                name, _, kind = key.rpartition("/")
                state[ordered.index(name)][kind] = take(parameters[name], t) if t.dim() else t
            groups, number = [], 0
            for group in optimizer.param_groups:
                groups.append(group | {"params": list(range(number, number := number + len(group["params"])))})
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        parameters = trainable(self.trainer.model)
        for name, fixed in directions(parameters).items():
            p = parameters[name]
            layout_of(p).weight(p).add_(fixed, alpha=1e-2)
        layout_of_model(self.trainer.model).sync_weights(self.trainer.model)


def trainable(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def take(p: Any, whole: Tensor) -> Tensor:
    piece = layout_of(p).piece(p)
    return whole if piece is None else piece.take(whole)


def join(p: Any, t: Tensor) -> Tensor:
    piece = layout_of(p).piece(p)
    return t.clone() if piece is None else piece.join(t)


def directions(parameters: dict[str, Any]) -> dict[str, Tensor]:
    """A fixed vector."""
    chance = torch.Generator().manual_seed(0)
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters.items()}
    return {name: take(parameters[name], torch.randn(shape, generator=chance)) for name, shape in shapes.items()}


def total(parameters: dict[str, Any], one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """An inner product."""
    value = torch.stack([(one[name] * other[name]).sum().double() for name in parameters]).sum()
    divided = layout_of(*parameters.values()).piece(next(iter(parameters.values()))) is not None
    return float(Process.this().all_reduce_sum(value) if divided else value)


def other_gradient(model: Any, parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Of the sum of a loss over rows that are dealt among the processes."""
    process = Process.this()
    own = {key: t[process.rank :: process.world] for key, t in OTHER.items()}
    own = own if len(own["labels"]) else {key: t[:1] for key, t in OTHER.items()}
    loss = model(**own).loss * (own["labels"][:, 1:] != -100).sum() / 100 * (process.rank < len(OTHER["labels"]))
    return layout_of(*parameters.values()).gradient_of_sum([loss], parameters, over_processes=True)


def torch_optimizer(trainer: Changing) -> Any:
    return layout_of_model(trainer.model).torch_optimizer(trainer.model, trainer.optimizer)


def arguments(folder: Path, engine: str | None, seed: int) -> TrainingArguments:
    world = Process.this().world
    values: dict[str, Any] = {"use_cpu": True}
    if engine is not None:
        begin()
        values = {"deepspeed": DEEPSPEED[engine], "accelerator_config": {"use_configured_state": True}}
    return TrainingArguments(
        str(folder / "checkpoints"),
        per_device_train_batch_size=BATCH // world // 2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        optim_args="momentum=0.9",
        weight_decay=0.1,
        max_grad_norm=0.5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
        **values,
    )


def train(folder: Path, engine: str | None) -> None:
    """Two stages, or one from what an earlier process left."""
    model = tiny_model(hidden_size=32)
    before = folder / "before.pt"
    for stage in (3,) if before.exists() else (1, 2):
        release(model)
        trainer = Changing(model, arguments(folder, engine, stage), Collator(0), ROWS)
        trainer.engine = engine
        trainer.add_callback(Follow(trainer, before))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    parameters = trainable(model)
    found = {
        "weights": {name: join(p, layout_of(p).weight(p)) for name, p in parameters.items()},
        "model": {name: full(p).detach() for name, p in parameters.items()},
        "state": {
            f"{name}/{kind}": join(p, t) if t.dim() else t
            for name, p in parameters.items()
            for kind, t in torch_optimizer(trainer).state[p].items()
            if isinstance(t, Tensor)
        }
        if engine != "zero0"
        else {},
    }
    if Process.this().main:
        torch.save(found, folder / f"{engine}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:] or [None]:
        train(Path(sys.argv[1]), name)
    os._exit(0)  # DeepSpeed's engines have nothing to say at exit
