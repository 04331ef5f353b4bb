"""Trainer on each engine: when DeepSpeed takes the model over, and checkpoints from which any engine goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import rotate_checkpoints

from holdfast.engines import zero
from holdfast.engines.optimizer_state import load_optimizer, save_optimizer
from holdfast.engines.vectors import weights
from holdfast.engines.whole import saves_together, whole_state, whole_weights_to_load
from holdfast.errors import ConfigError
from holdfast.system.files import flush_folder, write_json
from holdfast.training.checkpoint import COMPLETE, SCHEDULER_NAME, saved_weights
from holdfast.training.method_state import save_states

_Trainer: Any = object
"""Whatever Trainer stands behind."""


class EngineMixin(_Trainer):
    """What a Trainer does otherwise where an engine divides the model, and what its checkpoints hold.

    It stands before the Trainer among the bases of a continual trainer, whose attributes
    it reads.
    """

    lr_scheduler: Any
    _engine: zero.Engine | None  # DeepSpeed's

    def _make_engine(self) -> None:
        """Let DeepSpeed divide the weights before methods look at them, and again where one exchanged them.

        Raises:
            ConfigError: the DeepSpeed configuration has an optimizer or a scheduler of its own.
        """
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if not self.is_deepspeed_enabled or (self._engine is not None and self._engine.trained == trained):
            return
        config = self.accelerator.state.deepspeed_plugin.hf_ds_config
        if own := {"optimizer", "scheduler"} & config.config.keys():
            raise ConfigError(f"deepspeed: leave out {' and '.join(sorted(own))}; the trainer's own are used")
        if self.args.bf16 and not config.is_true("bf16.enabled"):
            zero.autocast(self.model)
        zero.release(self.model)
        self.optimizer, _ = deepspeed_init(self, num_training_steps=0)
        self.deepspeed, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.deepspeed
        self._engine = zero.Engine(self.accelerator, trained)
        zero.attach(self.deepspeed, self._after_backward)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self._engine is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._engine.resume()
        self.lr_scheduler = None
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model_wrapped, train_dataloader

    def _follow_parameters(self) -> None:
        """Let Trainer make its optimizer anew where a method exchanged the trained parameters before the stage."""
        if self.optimizer is None or self._engine is not None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not self._optimizer_is_given:
            if held != {id(p) for p in self.model.parameters() if p.requires_grad}:
                self.optimizer = None
        elif not held <= {id(p) for p in self.model.parameters()}:
            raise ConfigError(
                "optimizers: a method trains other parameters in this stage than the given optimizer holds; leave "
                "it out, so that the trainer makes one itself"
            )

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer loads all adapters of a model, but would leave only the first of several active ones active."""
        active: Any = getattr(self.model, "active_adapters", None)
        if self._together and not hasattr(self.model, "peft_config"):
            weights(self.model).load_(saved_weights(Path(str(args[0]))))
            return
        several = isinstance(active, list) and len(active) > 1
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if several:
            self.model.base_model.set_adapter(active[:1])
        with whole_weights_to_load(self.model):
            super()._load_from_checkpoint(*args, **kwargs)
        if several:
            self.model.base_model.set_adapter(active)
            for name, p in self.model.named_parameters():
                p.requires_grad_(name in trained)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = whole_state(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        elif saves_together(self.model):
            self.model.save_pretrained(output_dir, state_dict=state, is_main_process=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As whole tensors, so that another number of processes, or another engine, can go on."""
        save_optimizer(self._torch_optimizer(), self.model, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not Path(checkpoint, SCHEDULER_NAME).exists():
            return
        load_optimizer(self._torch_optimizer(), self.model, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _torch_optimizer(self) -> Any:
        return zero.unflattened(self.model) or getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        save_states(self.methods, folder / "method")
        cost = self.cost.of_all(self._process)
        if self.args.should_save:
            flush_folder(folder)
            write_json(folder / COMPLETE, {"step": self.state.global_step, "cost": cost})
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


@contextlib.contextmanager
def no_optimizer_saved(args: Any) -> Iterator[None]:
    """Inside, arguments say that no optimizer is saved: Trainer refuses sharded models that would, and we save it."""
    if args is None:
        yield
        return
    kept, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = kept
