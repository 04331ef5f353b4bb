"""A laboratory run: pretrain a small model, or go on from one on other text, with measurements; exact resume."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from holdfast import methods, tuners
from holdfast.api.method import Method
from holdfast.config.model import ModelConfig
from holdfast.data.tokens.file import TokenFile
from holdfast.engines.pieces import is_divided
from holdfast.engines.profiles import check_engine
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.lab.architecture import counted_parameters
from holdfast.lab.config import LabConfig, load_lab_config
from holdfast.lab.measure import Measures, distances
from holdfast.lab.mixture import Mixture
from holdfast.lab.model import make_model, tokenizer_of, write_note
from holdfast.lab.shapes import Evaluation, Result, Step
from holdfast.methods.compatibility import refusal
from holdfast.records.directory import RunDirectory, open_directory
from holdfast.records.follow import followed
from holdfast.records.inputs import Inputs
from holdfast.records.shapes import checked
from holdfast.records.trackers import chosen
from holdfast.runner.inputs import code_inputs, method_inputs, model_inputs
from holdfast.system.device import device_type
from holdfast.system.files import append_jsonl, read_appended, write_jsonl
from holdfast.system.interrupt import Interrupt
from holdfast.system.manifest import read_json, remedy
from holdfast.system.progress import Progress
from holdfast.training.arguments import RESERVED, check_arguments, training_arguments
from holdfast.training.chunked_trainer import ChunkedLossTrainer
from holdfast.training.state import RunContext
from holdfast.training.trainer import continual
from holdfast.training.watch import Watch, checkpoint_to_continue

ENDLESS = 1 << 40
"""Number of sequences of a run that only a loss or the clock ends."""

SET_BY_KEYS = RESERVED | {
    "num_train_epochs": "stop.epochs",
    "max_steps": "stop.tokens",
    "warmup_steps": "training.warmup_tokens",
    "adam_beta1": "training.betas",
    "adam_beta2": "training.betas",
    "torch_compile": "training.compile",
}
"""Fields of TrainingArguments that keys of a laboratory run's configuration set."""

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "wsd": "warmup_stable_decay"}
"""The names that transformers has for the schedules."""


class InOrder(ChunkedLossTrainer):
    """Takes the rows in the order of the dataset: a :class:`.Mixture` is shuffled already."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


LabTrainer: Any = continual(InOrder)


def pretrain(
    config: LabConfig | dict[str, Any] | str | Path,
    progress: Progress | None = None,
    *,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Train a model on token files until a stop condition holds; continue a run that was cut off.

    Args:
        config: a configuration, or the mapping or YAML file that :func:`load_lab_config` reads.
        progress: where to show progress; standard error where absent.
        accept_changes: continue although data, model, texts or code are no longer those that the run began with.

    Returns:
        the content of result.json: why and where training stopped, the model's size, and the measurements before
        training, at its end, and where the loss of the watched domain was lowest.

    Raises:
        UserError: the configuration, data or directory cannot be used, or a loss is not finite.
        Interrupted: SIGINT or SIGTERM asked it to stop; the same call continues it.
    """
    if not isinstance(config, LabConfig):
        config = load_lab_config(config)
    with open_directory(Path(config.output)) as directory, Interrupt() as interrupt:
        directory.check_config(config)
        path = directory.path / "result.json"
        if not path.exists():
            progress = progress or Progress(quiet=not directory.process.main)
            LabRun(config, directory, progress, interrupt, accept_changes).go()
        return checked(path, Result, read_json(path))


class LabRun:
    """One laboratory run at work. Whatever must survive a restart is in its directory.

    Attributes:
        steps: optimizer steps at most; None where only a loss or the clock ends the run.
        bound: the stop condition that ``steps`` follow from.
        stopped_by: the stop condition that ended training; None as long as none has.
    """

    def __init__(
        self,
        config: LabConfig,
        directory: RunDirectory,
        progress: Progress,
        interrupt: Interrupt,
        accept_changes: bool = False,
    ):
        self.accept_changes = accept_changes
        self.config, self.directory, self.process = config, directory, directory.process
        self.progress, self.interrupt = progress, interrupt
        self.path = directory.path
        self.title = f"{'go on' if config.model.path else 'pretrain'} {self.path.name}"
        self.stopped_by: str | None = None

    def go(self) -> None:
        """Train what is left to train, and write the model and the result."""
        trackers = chosen(self.config.training.report_to)
        self.prepare()
        with followed(self.directory, self.config, trackers) as self.followers:
            self.finish(self.train())
            self.followers.catch_up()

    def prepare(self) -> None:
        """Make the model, its measures and its trainer.

        Raises:
            UserError: the configuration or data cannot be used, or are not those that the run began with.
        """
        config = self.config
        check_arguments(config.training.arguments, SET_BY_KEYS)
        self.methods = applied = build_methods(config)
        self.tuner = tuners.build(config.tuner)
        check_engine(config.training.engine)
        self.tokenizer = tokenizer_of(config, TokenFile.open(Path(config.data[0].path)))
        files = {
            path: TokenFile.open(Path(path), self.tokenizer) for path in (*self.data_paths, *config.valid.values())
        }
        parts = [files[path].rows(config.context) for path in self.data_paths]
        sequences = sum(map(len, parts))
        model, self.start, self.init = make_model(config, self.tokenizer, self.directory)
        largest = max(range(len(parts)), key=lambda i: config.data[i].weight)
        if config.model.path is None and parts[largest].domain_id is not None:
            model.config.bos_token_id = parts[largest].domain_id  # its sequences begin with it
        self.parameters = counted_parameters(model)
        self.steps, self.bound = last_step(config, self.parameters, sequences)
        self.tuner.plan(config.training, self.steps or ENDLESS)
        if not is_divided(model):
            model = model.to(device_type())
        self.model = self.tuner.prepare(model)
        self.begin(files)
        self.measures = Measures(
            {domain: files[path].rows(config.context) for domain, path in config.valid.items()},
            rows=config.evaluation.rows,
            batch_size=config.evaluation.batch_size,
            process=self.process,
        )
        if config.model.path is not None:
            self.measures.remember(self.model)
        length = self.steps * config.training.batch_size if self.steps else ENDLESS
        mixture = Mixture(parts, [part.weight for part in config.data], length, config.seed)
        companion = self.tuner.companion()
        self.trainer = LabTrainer(
            model=self.model,
            args=arguments(config, self.steps, self.path / "checkpoint"),
            train_dataset=mixture,
            data_collator=_collate,
            method=applied if companion is None else [*applied, companion],
            task=" + ".join(Path(path).name for path in self.data_paths),
            run_context=RunContext(
                rows=mixture.first(sequences), folder=self.path / "rehearsal", tokenizer=self.tokenizer
            ),
        )

    def train(self) -> int:
        """Train from the newest checkpoint, or from the start, measure before and after, and return the last step."""
        checkpoint, step = checkpoint_to_continue(self.path / "checkpoint")
        self.rewind(step if checkpoint else -1)
        self.followers.catch_up()
        if checkpoint is None:
            self.measure(0)
        step = LabWatch(self).train(checkpoint)
        if self.evaluations[-1]["step"] != step:
            self.measure(step)
        return step

    @property
    def data_paths(self) -> list[str]:
        return [part.path for part in self.config.data]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The measurements so far, oldest first, of which the first was made before training.

        Raises:
            RunDirectoryError: the file is damaged.
        """
        return evaluations(self.path, self.config.valid)

    def so_far(self, step: int) -> dict[str, Any]:
        """The step, the tokens trained on until then, and the seconds of training, over all restarts."""
        tokens = step * self.config.training.batch_size * self.config.context
        return {"step": step, "tokens": tokens, "seconds": round(self.trainer.cost.seconds, 3)}

    def begin(self, files: dict[str, TokenFile]) -> None:
        """Write run.json, or check that the data are those that the run began with."""
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        facts = {
            "files": {
                path: {"tokens": len(file), "fingerprint": file.manifest["sha256"]} for path, file in files.items()
            },
            "parameters": {"counted": self.parameters, "trainable": trainable},
        }
        inputs: Inputs = method_inputs(self.methods) | code_inputs([*self.methods, self.tuner])
        if self.config.model.path is not None:
            inputs["model"] = model_inputs(ModelConfig(name=self.config.model.path))
        self.directory.begin(self.config, facts, data="files", inputs=inputs, accept_changes=self.accept_changes)

    def rewind(self, step: int) -> None:
        """Drop the lines about steps after the one that training goes on from; -1 drops all."""
        if self.process.main:
            for path in (self.path / "events.jsonl", self.path / "evaluations.jsonl"):
                lines = checked(path, list[Step], read_appended(path))
                write_jsonl(path, [line for line in lines if line["step"] <= step])
        self.process.wait()

    def measure(self, step: int) -> None:
        """Measure the losses and the distances of the weights after a step; all ranks call this."""
        domains = self.measures.losses(self.model)
        weights = distances(self.model, self.start, self.init)
        if self.process.main:
            line = self.so_far(step) | {"domains": domains, "weights": weights}
            append_jsonl(self.path / "evaluations.jsonl", line)
            self.followers.line(self.path / "evaluations.jsonl", line)
        self.process.wait()

    def verdict(self, step: int) -> str | None:
        """The stop condition that holds after a step, on every rank alike; None if training goes on."""
        stop, watched = self.config.stop, self.config.watched
        if step == self.steps:
            return self.bound
        if stop.seconds and self.process.any_of(self.trainer.cost.seconds >= stop.seconds):
            return "seconds"
        if (stop.loss or stop.patience) and self.evaluations[-1]["step"] == step:
            losses = [_loss(evaluation, watched) for evaluation in self.evaluations]
            if stop.loss and losses[-1] <= stop.loss:
                return "loss"
            if stop.patience and len(losses) - 1 - losses.index(min(losses)) >= stop.patience:
                return "patience"
        return None

    def finish(self, step: int) -> None:
        """Write the model and the result; checkpoints are no longer needed."""
        now = self.so_far(step)
        with self.directory.whole_folder(self.path / self.tuner.folder) as folder:
            self.tuner.save(self.model, folder)
            if self.process.main:
                self.tokenizer.save_pretrained(folder)
                write_note(folder, self.config, self.init, now["tokens"])
        evaluations, watched = self.evaluations, self.config.watched
        best = min(evaluations, key=lambda evaluation: _loss(evaluation, watched)) if watched else None
        if self.process.main:
            shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
        self.directory.finish({"seconds": {"train": now["seconds"]}})
        result = {"stop": self.stopped_by} | now | {"parameters": self.parameters}
        result |= {"start": evaluations[0], "end": evaluations[-1], "best": best}
        self.directory.write_json(self.path / "result.json", result)


def evaluations(folder: Path, domains: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The lines of a laboratory run's evaluations.jsonl, oldest first.

    Args:
        domains: that each of them has; None: those of the first.

    Raises:
        RunDirectoryError: the file is damaged, or is missing.
    """
    path = folder / "evaluations.jsonl"
    lines: list[dict[str, Any]] = checked(path, list[Evaluation], read_appended(path))
    if not lines or lines[0]["step"] != 0:
        raise RunDirectoryError(f"{path}: is damaged: the measurement before training is missing; {remedy(path)}")
    wanted = set(lines[0]["domains"] if domains is None else domains)
    for number, line in enumerate(lines, start=1):
        if line["domains"].keys() != wanted:
            named = ", ".join(sorted(wanted))
            raise RunDirectoryError(f"{path}: is damaged: line {number}: domains must be {named}; {remedy(path)}")
    return lines


def _loss(evaluation: dict[str, Any], domain: str | None) -> float:
    """The loss of a domain; infinite where it was not finite, so that it is the worst of all."""
    loss = evaluation["domains"][domain]["loss"]
    return math.inf if loss is None else loss


class LabWatch(Watch):
    """Watches a laboratory run: it is measured, and a stop condition ends it."""

    def __init__(self, run: LabRun):
        events = run.path / "events.jsonl"
        super().__init__(run.trainer, run.title, events, run.progress, run.interrupt, run.followers)
        self.run = run
        every = run.config.evaluation.every
        self.every = max(1, round(every / run.so_far(1)["tokens"])) if every else None

    def after_step(self, step: int, last: bool) -> bool:
        if self.every and step % self.every == 0:
            with self.trainer.cost.aside():
                self.run.measure(step)
        self.run.stopped_by = self.run.verdict(step)
        return self.run.stopped_by is not None

    def event(self, step: int) -> dict[str, Any]:
        return self.run.so_far(step)

    def tokens(self, step: int) -> int:
        return self.run.so_far(step)["tokens"]

    def steps(self, most: int) -> int | None:
        return self.run.steps


def build_methods(config: LabConfig) -> list[Method]:
    """The methods of a laboratory run.

    Raises:
        ConfigError: a method does not exist, an option is wrong, or it does not go with the tuner.
    """
    applied = methods.build([(method.name, method.options) for method in config.method])
    for method in applied:
        if reason := refusal(method, config.tuner.name):
            raise ConfigError(f"tuner: {reason}")
    return applied


def last_step(config: LabConfig, parameters: int, sequences: int) -> tuple[int | None, str]:
    """Optimizer steps at most, and the stop condition that they follow from; (None, ""): none bounds them.

    Args:
        parameters: of the model.
        sequences: of all files of the mixture.
    """
    stop = config.stop
    tokens = {
        "tokens": stop.tokens,
        "tokens_per_parameter": stop.tokens_per_parameter and stop.tokens_per_parameter * parameters,
        "epochs": stop.epochs and stop.epochs * sequences * config.context,
    }
    bounds = {condition: count for condition, count in tokens.items() if count}
    if not bounds:
        return None, ""
    first = min(bounds, key=lambda condition: bounds[condition])
    return max(1, round(bounds[first] / (config.training.batch_size * config.context))), first


def arguments(config: LabConfig, steps: int | None, checkpoints: Path) -> TrainingArguments:
    """TrainingArguments of a laboratory run.

    Raises:
        ConfigError: the batch cannot be divided among the processes, or transformers does not take a value.
    """
    training = config.training
    fields: dict[str, Any] = {
        "max_steps": steps or ENDLESS // training.batch_size,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "warmup_steps": round(training.warmup_tokens / (training.batch_size * config.context)),
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "optim": "adamw_torch_fused",
        "torch_compile": training.compile,
        "seed": config.seed,
    }
    if training.schedule == "wsd":
        assert steps is not None
        fields["lr_scheduler_kwargs"] = {"num_decay_steps": max(1, round(training.decay * steps))}
    return training_arguments(training, checkpoints, fields)


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of sequences of one length: nothing is padded, so there is no mask."""
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("input_ids", "labels")}
