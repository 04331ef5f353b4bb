"""A laboratory run: pretrain a small model, or go on from one on other text; measured all the way, resumed anywhere."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from holdfast import methods, tuners
from holdfast.data.tokens.file import TokenFile
from holdfast.engines.pieces import is_divided
from holdfast.engines.process import Process
from holdfast.engines.profiles import check_engine
from holdfast.errors import ConfigError, Interrupted
from holdfast.lab.architecture import counted_parameters
from holdfast.lab.config import LabConfig, load_lab_config
from holdfast.lab.measure import Measures, distances
from holdfast.lab.mixture import Mixture
from holdfast.lab.model import make_model, tokenizer_of, write_note
from holdfast.methods.compatibility import refusal
from holdfast.records.directory import RunDirectory, open_directory
from holdfast.system.files import read_json, read_jsonl, write_jsonl
from holdfast.system.interrupt import Interrupt
from holdfast.system.progress import Bar, Progress
from holdfast.training.arguments import RESERVED, check_arguments, training_arguments
from holdfast.training.checkpoint import newest_whole_checkpoint
from holdfast.training.chunked_trainer import ChunkedLossTrainer
from holdfast.training.trainer import continual

ENDLESS = 1 << 40
"""Sequences of a run that only its loss or the clock ends."""

TAKEN = RESERVED | {
    "num_train_epochs": "stop.epochs",
    "max_steps": "stop.tokens",
    "warmup_steps": "training.warmup_tokens",
    "adam_beta1": "training.betas",
    "adam_beta2": "training.betas",
    "torch_compile": "training.compile",
}
"""Fields of TrainingArguments that a key of the configuration stands for."""


class InOrder(ChunkedLossTrainer):
    """Takes the rows as they come: a mixture has its order in itself."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


LabTrainer: Any = continual(InOrder)


def pretrain(config: LabConfig | dict[str, Any] | str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train a model on token files until a stop condition holds; continue where an earlier start was cut off.

    Args:
        config: a configuration, or the mapping or YAML file that :func:`load_lab_config` reads.
        progress: where to show progress; standard error where absent.

    Returns:
        what result.json holds: why and where training stopped, the model's size, and what was measured before
        training, at its end, and where the loss of the watched domain was lowest.

    Raises:
        UserError: the configuration, data or directory cannot be used, or a loss is not finite.
        Interrupted: SIGINT or SIGTERM asked it to stop; the same call continues it.
    """
    if not isinstance(config, LabConfig):
        config = load_lab_config(config)
    process = Process.this()
    with open_directory(Path(config.output)) as directory, Interrupt() as interrupt:
        directory.check_config(config)
        path = directory.path / "result.json"
        if not path.exists():
            LabRun(config, directory, process, progress or Progress(quiet=not process.main), interrupt).go()
        return read_json(path)


class LabRun:
    """One laboratory run at work. What must survive a restart is in its directory.

    Attributes:
        seconds: spent training so far, in all starts together.
    """

    def __init__(
        self, config: LabConfig, directory: RunDirectory, process: Process, progress: Progress, interrupt: Interrupt
    ):
        self.config, self.directory, self.process = config, directory, process
        self.progress, self.interrupt = progress, interrupt
        self.path = directory.path
        self.seconds = 0.0
        self.why: str | None = None  # it stopped

    def go(self) -> None:
        """Train what is left to train, and write the model and the result."""
        config = self.config
        check_arguments(config.training.arguments, TAKEN)
        chosen = methods.build([(method.name, method.options) for method in config.method])
        for method in chosen:
            if reason := refusal(method, config.tuner.name):
                raise ConfigError(f"tuner: {reason}")
        tuner = tuners.build(config.tuner)
        check_engine(config.training.engine)
        tokenizer = tokenizer_of(config, TokenFile.open(Path(config.data[0].path)))
        paths = {path: TokenFile.open(Path(path), tokenizer) for path in (*self.data_paths, *config.valid.values())}
        rows = [paths[path].rows(config.context) for path in self.data_paths]
        model, start, init = make_model(config, tokenizer, self.directory)
        largest = max(range(len(rows)), key=lambda i: config.data[i].weight)
        if config.model.path is None and rows[largest].domain_id is not None:
            model.config.bos_token_id = rows[largest].domain_id  # what its sequences begin with
        parameters = counted_parameters(model)
        steps, self.bound = self.last_step(parameters, sum(map(len, rows)))
        tuner.plan(config.training, steps or ENDLESS)  # type: ignore[arg-type]
        if not is_divided(model):
            model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        model = tuner.prepare(model)
        self.begin(paths, model, parameters)
        measures = Measures(
            {domain: paths[path].rows(config.context) for domain, path in config.valid.items()},
            rows=config.evaluation.rows,
            batch_size=config.evaluation.batch_size,
            process=self.process,
        )
        if config.model.path is not None:
            measures.remember(model)

        def measure(step: int) -> None:
            self.note(step, measures.losses(model), distances(model, start, init))

        length = steps * config.training.batch_size if steps else ENDLESS
        mixture = Mixture(rows, [part.weight for part in config.data], length, config.seed)
        companion = tuner.companion()
        trainer = LabTrainer(
            model=model,
            args=arguments(config, steps, self.path / "checkpoint", self.process),
            train_dataset=mixture,
            data_collator=_collate,
            method=chosen if companion is None else [*chosen, companion],
            task=" + ".join(Path(path).name for path in self.data_paths),
            rows=mixture.first(sum(map(len, rows))),
            folder=self.path / "rehearsal",
            tokenizer=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        main = self.process.main
        checkpoint = self.process.broadcast(newest_whole_checkpoint(self.path / "checkpoint") if main else None)
        self.rewind(checkpoint)
        title = f"{'go on' if config.model.path else 'pretrain'} {self.path.name}"
        if checkpoint:
            self.progress.line(f"{title}: continues from {checkpoint.name}")
        else:
            measure(0)
        with self.progress.bar(title) as bar:
            trainer.add_callback(_Watch(self, trainer, measure, steps, bar))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        if trainer.interrupted:
            raise Interrupted(f"stopped in {title!r} after step {step}")
        if self.evaluations[-1]["step"] != step:
            measure(step)
        with self.directory.whole_folder(self.path / tuner.folder) as folder:
            tuner.save(model, folder)
            if main:
                tokenizer.save_pretrained(folder)
                write_note(folder, config, init, step * self.tokens_a_step)
        self.finish(step, parameters)

    @property
    def data_paths(self) -> list[str]:
        return [part.path for part in self.config.data]

    @property
    def tokens_a_step(self) -> int:
        return self.config.training.batch_size * self.config.context

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What has been measured so far, oldest first."""
        return read_jsonl(self.path / "evaluations.jsonl")

    def last_step(self, parameters: int, rows: int) -> tuple[int | None, str]:
        """Optimizer steps at most, and which condition says so; None where only a loss or the clock ends the run."""
        stop = self.config.stop
        tokens = {
            "tokens": stop.tokens or 0,
            "tokens_per_parameter": (stop.tokens_per_parameter or 0) * parameters,
            "epochs": (stop.epochs or 0) * rows * self.config.context,
        }
        known = {key: count for key, count in tokens.items() if count}
        if not known:
            return None, ""
        first = min(known, key=lambda key: known[key])
        return max(1, round(known[first] / self.tokens_a_step)), first

    def begin(self, files: dict[str, TokenFile], model: Any, parameters: int) -> None:
        """Write run.json, or check that the data are those that the run began with."""
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = {
            "files": {
                path: {"tokens": len(file), "fingerprint": file.manifest["sha256"]} for path, file in files.items()
            },
            "parameters": {"counted": parameters, "trainable": trainable},
        }
        self.directory.begin(self.config, facts, data="files")

    def rewind(self, checkpoint: Path | None) -> None:
        """Drop what was noted after the step that training goes on from."""
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
        paths = [self.path / name for name in ("events.jsonl", "evaluations.jsonl")]
        if self.process.main:
            for path in paths:
                kept = [line for line in read_jsonl(path) if line["step"] <= step] if path.exists() else []
                write_jsonl(path, kept)
        self.process.wait()
        self.seconds = max((line["seconds"] for path in paths for line in read_jsonl(path)), default=0.0)

    def note(self, step: int, domains: dict[str, Any], weights: dict[str, Any]) -> None:
        """Write down what was measured after a step."""
        self.append(
            "evaluations.jsonl",
            {
                "step": step,
                "tokens": step * self.tokens_a_step,
                "seconds": round(self.seconds, 3),
                "domains": domains,
                "weights": weights,
            },
        )
        self.process.wait()

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line to a file of the run."""
        if self.process.main:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def verdict(self, step: int, steps: int | None) -> str | None:
        """Why training stops after a step; None if it goes on."""
        stop, watched = self.config.stop, self.config.watched
        if step == steps:
            return self.bound
        if stop.seconds and self.process.all_reduce_sum(torch.tensor(float(self.seconds >= stop.seconds))) > 0:
            return "seconds"
        if (stop.loss or stop.patience) and self.evaluations[-1]["step"] == step:
            losses = [evaluation["domains"][watched]["loss"] for evaluation in self.evaluations]
            if stop.loss and losses[-1] <= stop.loss:
                return "loss"
            if stop.patience and len(losses) - 1 - losses.index(min(losses)) >= stop.patience:
                return "patience"
        return None

    def finish(self, step: int, parameters: int) -> None:
        """Write the result; checkpoints are no longer needed."""
        evaluations, watched = self.evaluations, self.config.watched
        best = min(evaluations, key=lambda e: e["domains"][watched]["loss"]) if watched else None
        if self.process.main:
            shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
        self.directory.finish({"train": round(self.seconds, 3)})
        self.directory.write_json(
            self.path / "result.json",
            {
                "stop": self.why,
                "step": step,
                "tokens": step * self.tokens_a_step,
                "seconds": round(self.seconds, 3),
                "parameters": parameters,
                "start": evaluations[0],
                "end": evaluations[-1],
                "best": best,
            },
        )


def arguments(config: LabConfig, steps: int | None, checkpoints: Path, process: Process) -> TrainingArguments:
    """TrainingArguments of a laboratory run.

    Raises:
        ConfigError: the batch cannot be shared by the processes, or a value is not one that transformers takes.
    """
    training = config.training
    micro = training.micro_batch_size or training.batch_size // process.world
    if training.batch_size % (micro * process.world or 1) or not micro:
        raise ConfigError(
            f"training.batch_size: {training.batch_size} sequences cannot be shared by {process.world} processes in "
            f"micro-batches of {micro or 1}"
        )
    schedules = {"constant": "constant_with_warmup", "cosine": "cosine", "wsd": "warmup_stable_decay"}
    own: dict[str, Any] = {}
    if training.schedule == "wsd":
        assert steps is not None
        own["lr_scheduler_kwargs"] = {"num_decay_steps": max(1, round(training.decay * steps))}
    if process.world > 1 and not torch.cuda.is_available():
        own["ddp_backend"] = "gloo"
    return training_arguments(
        training,
        checkpoints,
        max_steps=steps or ENDLESS // training.batch_size,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // (micro * process.world),
        lr_scheduler_type=schedules[training.schedule],
        warmup_steps=round(training.warmup_tokens / (training.batch_size * config.context)),
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        optim="adamw_torch_fused",
        torch_compile=training.compile,
        seed=config.seed,
        ddp_find_unused_parameters=False,
        **own,
    )


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sequences of one length as a batch; nothing is padded, so there is no mask."""
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("input_ids", "labels")}


class _Watch(TrainerCallback):
    """Measures, writes events, moves the progress bar, and ends training when the run says so or a signal came."""

    def __init__(self, run: LabRun, trainer: Any, measure: Callable[[int], None], steps: int | None, bar: Bar):
        self.run, self.trainer, self.measure, self.steps, self.bar = run, trainer, measure, steps, bar
        every = run.config.evaluation.every
        self.every = max(1, round(every / run.tokens_a_step)) if every else None
        self.since = time.monotonic()
        self.logged: tuple[int, float] | None = None
        self.note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.monotonic()
        self.logged = (state.global_step, self.run.seconds)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, step = self.run, state.global_step
        run.seconds += time.monotonic() - self.since
        if self.every and step % self.every == 0:
            self.measure(step)
        run.why = run.verdict(step, self.steps)
        self.bar.update(step, self.note, total=self.steps or step + 1)
        if run.why:
            control.should_training_stop = True
            control.should_save = False
        elif run.interrupt.requested:
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save or control.should_training_stop
        self.since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        run, step = self.run, state.global_step
        assert self.logged is not None
        steps, seconds = step - self.logged[0], run.seconds - self.logged[1]
        self.logged = (step, run.seconds)
        run.append(
            "events.jsonl",
            {
                "step": step,
                "tokens": step * run.tokens_a_step,
                "seconds": round(run.seconds, 3),
                "loss": logs["loss"],
                "terms": {key.removeprefix("term/"): v for key, v in logs.items() if key.startswith("term/")},
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens_per_second": round(steps * run.tokens_a_step / max(seconds, 1e-9), 1),
            },
        )
        self.note = f"loss {logs['loss']:.3f}"
