"""Trainer on each engine: when DeepSpeed takes the model over, what DDP waits for, and checkpoints for any engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import rotate_checkpoints

from holdfast.engines import zero
from holdfast.engines.autocast import autocast
from holdfast.engines.optimizer_state import load_optimizer, save_optimizer
from holdfast.engines.pieces import is_divided, layout_of, layout_of_model, reshard, trainable
from holdfast.engines.vectors import weights
from holdfast.engines.whole import saves_together, whole_state, whole_weights_to_load
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.models.pretrained import readable
from holdfast.models.weights import load_language_model
from holdfast.system.shapes import Facts, alike, of_shape
from holdfast.training.checkpoint import SCHEDULER_NAME, complete_checkpoint, saved_weights
from holdfast.training.method_state import save_states
from holdfast.training.state import ContinualState

_Trainer: Any = object
"""Any Trainer: the class that stands behind."""


class EngineMixin(_Trainer):
    """What a Trainer does otherwise where an engine divides the model, and what its checkpoints hold."""

    lr_scheduler: Any
    _holdfast: ContinualState

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        engine = self._holdfast.engine
        _check_optimizer(self)
        if engine is None:
            reshard(self.model)  # as the optimizer must find the parameters
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        engine.resume()
        self.lr_scheduler = None
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model_wrapped, train_dataloader

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Trainer would average the gradients of these parameters as they come; ``average_replicated`` does so once a
        step, for the methods."""
        for p in trainable(model).values():
            setattr(p, "_replicated_grad_hook_registered", True)  # noqa: B010 - the name is Trainer's
        super()._sync_replicated_trainable_parameters(model)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer loads all adapters of a model, but would leave only the first of several active ones active, and PEFT
        would train all of it."""
        with _readable(args[0]):
            active: Any = getattr(self.model, "active_adapters", None)
            if not hasattr(self.model, "peft_config") and (saved := _whole_model(self.model, Path(str(args[0])))):
                weights(self.model).load_(saved)
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
        """Save whole tensors, so that another number of processes, or another engine, can go on."""
        save_optimizer(_torch_optimizer(self), self.model, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not Path(checkpoint, SCHEDULER_NAME).exists():
            return
        with _readable(checkpoint):
            groups = load_optimizer(_torch_optimizer(self), self.model, Path(checkpoint))
            saved = of_shape(Facts, torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
            saved = _of_groups(saved, groups, self.lr_scheduler.state_dict())
            _check_schedule(self.lr_scheduler, saved)
            self.lr_scheduler.load_state_dict(saved)
        super()._load_optimizer_and_scheduler(checkpoint)  # finds no optimizer, but a subclass may load more

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save what the methods keep, too, and a note that the checkpoint is complete; only then remove older ones."""
        state = self._holdfast
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        save_states(state.methods, folder / "method")
        cost = state.cost.of_all(state.process)
        if self.args.should_save:
            facts = {"step": self.state.global_step, "stage": state.stage_index, "task": state.task_name, "cost": cost}
            complete_checkpoint(folder, facts)
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def _check_optimizer(trainer: Any) -> None:
    """ConfigError if the optimizer, by its name or its class, cannot step the trained parameters as they lie."""
    layout = layout_of(*trainable(trainer.model).values())
    if trainer._holdfast.optimizer_is_given:
        optimizer = trainer.optimizer
        while (inner := getattr(optimizer, "optimizer", None)) is not None:  # accelerate and DeepSpeed wrap it
            optimizer = inner
        layout.check_class(type(optimizer))
    elif trainer.optimizer_cls_and_kwargs is not None:
        made = trainer.optimizer_cls_and_kwargs[0]
        layout.check_class(made if isinstance(made, type) else type(made))  # a class, or what makes the optimizer
    else:
        layout.check_optimizer(trainer.args.optim.value)


def hand_to_engine(trainer: Any) -> None:
    """Let the model compute as in training, and DeepSpeed divide the weights, before methods look at them, and again
    where a method exchanged them.

    Raises:
        ConfigError: the DeepSpeed configuration has an optimizer or a scheduler of its own; or it is in fp16, and a
            method needs gradients, which it keeps in float16, multiplied by the loss scale.
    """
    state = trainer._holdfast
    if trainer.args.bf16 and not trainer.is_deepspeed_enabled:
        autocast(trainer.model)
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    if not trainer.is_deepspeed_enabled or (state.engine is not None and state.engine.trained == trained):
        return
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    if given := {"optimizer", "scheduler"} & config.config.keys():
        raise ConfigError(f"deepspeed: leave out {' and '.join(sorted(given))}; the trainer's own are used")
    check_loss_scale(trainer)
    if trainer.args.bf16 and not config.is_true("bf16.enabled"):
        autocast(trainer.model)
    zero.release(trainer.model)
    trainer.optimizer, _ = deepspeed_init(trainer, num_training_steps=0)
    trainer.deepspeed, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = trainer.deepspeed
    state.engine = zero.Engine(trainer.accelerator, trained)
    engine = trainer.deepspeed
    scale = (lambda: float(engine.optimizer.loss_scale)) if scales_loss(trainer) else lambda: 1.0
    zero.attach(engine, lambda: state.after_backward(trainer.model, scale()))


def check_loss_scale(trainer: Any) -> None:
    """ConfigError if DeepSpeed trains in fp16, and a method needs gradients."""
    if scales_loss(trainer) and (needs := trainer._holdfast.names_of("after_backward")):
        raise ConfigError(
            f"fp16: method {needs} needs the gradients, which DeepSpeed keeps in float16, multiplied by its loss "
            "scale: without it the small ones would be lost; use bf16"
        )


def renew_optimizer(trainer: Any) -> None:
    """Let Trainer make its optimizer anew for each stage.

    Averages of an earlier stage's gradients say nothing of this stage's loss, and a method may have exchanged the
    trained parameters. An optimizer that the user gave is the user's: it keeps its state.

    Raises:
        ConfigError: the user gave the optimizer, and a method exchanged the parameters that it holds.
    """
    state, model = trainer._holdfast, trainer.model
    if trainer.optimizer is None or state.engine is not None:
        return
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    if not state.optimizer_is_given:
        if state.has_trained or held != {id(p) for p in model.parameters() if p.requires_grad}:
            trainer.optimizer = None
    elif not held <= {id(p) for p in model.parameters()}:
        raise ConfigError(
            "optimizers: a method trains other parameters in this stage than the given optimizer holds; leave "
            "it out, so that the trainer makes one itself"
        )


def scales_loss(trainer: Any) -> bool:
    """Whether DeepSpeed trains in fp16, where it scales the loss and skips steps whose gradients overflow."""
    return trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.hf_ds_config.is_true(
        "fp16.enabled"
    )


def _torch_optimizer(trainer: Any) -> Any:
    return layout_of_model(trainer.model).torch_optimizer(trainer.model, trainer.optimizer)


@contextlib.contextmanager
def optimizer_not_saved(arguments: Iterable[Any]) -> Iterator[None]:
    """Inside, TrainingArguments among a sharded model's trainer's arguments say that no optimizer is saved.

    Trainer refuses to save the optimizer of a sharded model; a continual trainer saves it by itself.
    """
    values = list(arguments)
    sharded = any(isinstance(v, nn.Module) and getattr(v, "_is_fsdp_managed_module", False) for v in values)
    settings = next((v for v in values if isinstance(v, TrainingArguments)), None)
    if settings is None or not sharded:
        yield
        return
    before, settings.save_only_model = settings.save_only_model, True
    try:
        yield
    finally:
        settings.save_only_model = before


@contextlib.contextmanager
def ddp_expects_all(trainer: Any) -> Iterator[None]:
    """Inside, a model that is wrapped in DDP waits for the gradients of all parameters; see :func:`reach_all`.

    It is so where methods add to the loss and the arguments say nothing of unused parameters.
    """
    handler = getattr(trainer.accelerator, "ddp_handler", None)
    said = trainer.args.ddp_find_unused_parameters
    if handler is None or said is not None or not trainer._holdfast.adds_to_loss:
        yield
        return
    before, handler.find_unused_parameters = handler.find_unused_parameters, False
    try:
        yield
    finally:
        handler.find_unused_parameters = before


def reach_all(model: Any, loss: Any) -> Any:
    """The loss, of which every trainable parameter of a DDP model seems to be a part.

    DDP waits for the gradients of all parameters. Where it is asked to, it looks for those that the forward pass did
    not use and does not wait for them; but a method's term may use them beside the forward pass. So it is not asked to
    look, and this tells it that all are used.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return loss
    return _Reach.apply(loss, *trainable(model.module).values())


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*gradients, *[None] * ctx.count)


def _of_groups(saved: Facts, groups: list[int | None], now: Facts) -> Facts:
    """A saved schedule, with its entries for each group of parameters in the order of the groups that there are now.

    Args:
        groups: the number of each group among the saved ones, None for one without parameters, which may not be there.
        now: the schedule's state, of which such a group keeps its entries.
    """
    found = dict(saved)
    for key, values in now.items():
        theirs = saved.get(key)
        if isinstance(values, list) and isinstance(theirs, list) and len(theirs) != len(values) == len(groups):
            places = zip(groups, values, strict=True)
            found[key] = [theirs[g] if g is not None and g < len(theirs) else value for g, value in places]
    return found


def _check_schedule(scheduler: Any, saved: Facts) -> None:
    """ValueError if this is no state of such a schedule, which makes its attributes of whatever it loads."""
    now = scheduler.state_dict()
    wrong = [key for key, value in now.items() if key in saved and not alike(saved[key], value)]
    wrong += [key for key in saved.keys() - now.keys() if hasattr(type(scheduler), key)]
    wrong += list(now.keys() & {"last_epoch"} - saved.keys())
    if wrong:
        raise ValueError(f"{SCHEDULER_NAME}: {wrong[0]}: is not what a schedule like this one has")


def _readable(checkpoint: Any) -> AbstractContextManager[None]:
    what = f"{checkpoint}: is damaged; delete it, and go on from an earlier checkpoint or the start"
    return readable(what, RunDirectoryError)


def _whole_model(model: nn.Module, checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint of a whole model, if Trainer cannot load them: a divided model's, and those that
    transformers has under other names in files than in memory, which Trainer would pass over. Otherwise none."""
    divided, saved = is_divided(model), saved_weights(checkpoint)
    if saved and not trainable(model).keys() <= saved.keys():
        return dict(load_language_model(checkpoint, key="checkpoint").named_parameters())
    return saved if divided else {}
