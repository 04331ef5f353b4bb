"""The dry run: one decoded and masked example of each task, the plan and its cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from holdfast.api.rows import row_length
from holdfast.api.task import Task
from holdfast.config.gate import GateConfig
from holdfast.config.keep import KeepConfig
from holdfast.config.run import RunConfig
from holdfast.data.arrow_rows import ArrowRows
from holdfast.errors import ConfigError
from holdfast.models.pretrained import load_model_config
from holdfast.models.weights import check_weights, shapes
from holdfast.records.directory import RunDirectory, check_directory
from holdfast.runner.abilities import print_asked, print_general
from holdfast.runner.begun import as_begun
from holdfast.runner.data import RunData
from holdfast.runner.due import due
from holdfast.runner.plan import START
from holdfast.runner.setup import NEW, Setup, check_growth, prepare, resolve
from holdfast.runner.stage import check_training
from holdfast.system.machine import free_gib
from holdfast.system.progress import Progress
from holdfast.tuners.peft import PeftTuner

KINDS = {
    "dpo": "pairs of a chosen and a rejected answer; below, the chosen one, as methods see it",
    "kto": "answers that are good or bad; below, the first good one, as methods see it",
    "grpo": "answers that the model writes are rewarded; an answer below is the row's own, which methods alone see",
}
"""What is said of a task of another kind than sft."""


def print_check(
    config: RunConfig, console: Console, data: RunData | None = None, measured: Progress | None = None
) -> None:
    """Load everything but the weights, and print the plan.

    Args:
        data: of the run, if it is loaded already.
        measured: load the weights too, measure the general abilities of the model before training, and show the
            progress of this here.

    Raises:
        UserError: `holdfast run` would refuse the configuration or the data.
    """
    record = RunDirectory(Path(config.output)).record
    resolved = resolve(as_begun(config, record))
    directory = check_directory(Path(config.output), resolved.config)
    setup = prepare(resolved, data, directory.past() if directory else NEW, begins=not record)
    appended = check_growth(setup, directory) if directory else []
    check_training(setup)
    checked = check_weights(config.model)
    if isinstance(setup.tuner, PeftTuner):
        setup.tuner.check_layers(shapes(config.model))
    console.print(f"stream {setup.stream.name}, version {setup.stream.version}", markup=False)
    for task in setup.stream.tasks:
        rows = setup.rows[task.name]
        console.rule(f"task {task.name}", align="left")
        beside = f", beside it {', '.join(task.beside)}" if task.beside else ""
        console.print(f"{len(task.train)} train and {len(task.test)} test examples, metric {task.metric}{beside}")
        console.print(noticed(task), soft_wrap=True)
        for note in task.notes:
            console.print(note, markup=False, soft_wrap=True)
        if isinstance(rows, ArrowRows):
            console.print(stored(setup), markup=False, soft_wrap=True)
        if task.kind != "sft":
            console.print(f"kind {task.kind}: {KINDS[task.kind]}", markup=False, soft_wrap=True)
        if rows:
            shown = f"first train example, {row_length(rows[0])} tokens, [supervised] in brackets:"
            console.print(shown, markup=False)
            console.print(masked(setup, rows[0]), markup=False, soft_wrap=True)
        else:
            console.print(f"first prompt: {task.train[0].question}", markup=False, soft_wrap=True)
    if setup.general:
        console.rule("general abilities", align="left")
        if measured is None:
            print_asked(setup.general, console)
        else:
            print_general(setup, console, measured)
    elif measured is not None:
        raise ConfigError("evaluation.general: names no measure, so --general has nothing to measure")
    console.rule("plan", align="left")
    if appended:
        console.print(f"the run goes on with appended tasks: {', '.join(appended)}", markup=False, soft_wrap=True)
    for line in plan_lines(setup):
        console.print(line, markup=False, soft_wrap=True)
    if not checked:
        console.print("whether the model's files hold all its weights is checked when they are loaded", markup=False)


def stored(setup: Setup) -> str:
    """Where the tokens of a large task lie."""
    if (cache := setup.config.data.cache) is None:
        return "its tokens are made at each start, and stay in memory; data.cache names a folder that keeps them"
    return f"its tokens are kept in {cache} (data.cache), and found again at the next start"


def noticed(task: Task) -> str:
    """The suspicious rows of a task, counted, in a line."""
    counts = task.counts
    parts = [
        f"{counts.duplicate_train_rows} duplicate train rows",
        f"{counts.test_rows_in_train} test rows stand in train",
    ]
    for count, what in (
        (counts.contradicting_train_rows, "train rows ask again with another answer"),
        (counts.duplicate_test_rows, "duplicate test rows"),
        (counts.test_rows_in_other_tasks, "test rows stand in the train rows of other tasks"),
        (counts.dropped_train_rows, "train rows dropped"),
    ):
        parts += [f"{count} {what}"] if count else []
    return ", ".join(parts)


def masked(setup: Setup, row: dict[str, Any]) -> str:
    """An example as the model sees it, with the tokens that the loss counts in brackets.

    Of a sequence-to-sequence model, what the encoder reads and what the decoder reads.
    """
    encoder = setup.encoder
    if "encoder_ids" in row:
        prompt = encoder.shown(row["encoder_ids"])
        answer = masked(setup, {key: row[key] for key in ("input_ids", "labels")})
        return f"encoder: {prompt}\ndecoder: {answer}"
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        supervised = label != -100
        if not pieces or pieces[-1][0] != supervised:
            pieces.append((supervised, []))
        pieces[-1][1].append(token)
    texts = ((supervised, encoder.shown(ids)) for supervised, ids in pieces)
    return "".join(f"[{text}]" if supervised else text for supervised, text in texts)


def plan_lines(setup: Setup) -> list[str]:
    """The lines of the plan: stages, steps, tokens and disk space."""
    config = setup.config
    lines = [
        f"model {config.model.name}, tuner {setup.tuner.name}, method {' + '.join(m.name for m in setup.methods)}, "
        f"max_length {setup.max_length}, seed {config.seed}",
        f"weights in {config.model.quantization or config.model.dtype}, training computes in "
        f"{config.training.precision}" + (f": {setup.types}" if setup.types else ""),
    ]
    total = 0
    for stage, training, steps in zip(setup.stages, setup.training, setup.steps, strict=True):
        parts = [setup.rows[task.name] for task in stage.tasks]
        count = sum(map(len, parts)) if stage.tasks[0].kind == "sft" else len(stage.tasks[0].train)
        assert not isinstance(training.epochs, list)
        passes = min(training.epochs, steps * training.batch_size / count)
        seen = round(sum(row_length(row) for part in parts for row in part) * passes)
        done = stage.index in setup.past.finished
        total += 0 if done else seen
        lines.append(
            f"stage {stage.index} {stage.name}: {count} rows, {steps} steps, {seen:,} tokens"
            + (", done" if done else "")
        )
    if setup.samples is not None:
        lines.append(f"general samples of the stream, for methods that name no others: {setup.samples}")
    if not setup.stages:
        lines.append("no stages: the model stays as it is")
    left = [stage for stage in (START, *setup.stages) if stage.index not in setup.past.finished]
    planned = [due(config.evaluation, stage, setup.stages, setup.stream.tasks, setup.general) for stage in left]
    tests = [sum(len(task.test) for task in of.tasks) for of in planned]
    size = model_bytes(setup)
    lines += [
        f"training sees {total:,} tokens of the tasks; methods may add rehearsal rows",
        f"evaluation: {_evaluations(tests, 'test examples')}, and "
        f"{_evaluations([len(of.general) for of in planned], 'general measures')}",
        f"{setup.encoder.truncated} train examples were shortened to max_length"
        + (f", of {setup.encoder.cut_answers} the answer too" if setup.encoder.cut_answers else ""),
        *gate_lines(config.gate),
        *keep_lines(config.keep),
        f"weights: about {size / 2**30:.3f} GiB; a full checkpoint about {3 * size / 2**30:.3f} GiB; "
        f"{free_gib(Path(config.output)):.0f} GiB are free for {config.output}",
    ]
    return lines


def _evaluations(counts: list[int], what: str) -> str:
    """How much is measured, and how often."""
    if len(set(counts)) <= 1:
        return f"{sum(counts[:1])} {what}, {len(counts)} times"
    return f"{sum(counts)} {what} in {len(counts)} measurements"


def gate_lines(gate: GateConfig | None) -> list[str]:
    """The limits for every stage, and what a failure leads to."""
    if gate is None:
        return []
    limits = ", ".join(f"{key} {limit}" for key, limit in gate.limits.items())
    early = "; a stage ends early beyond max_general_loss_increase" if gate.stop_early else ""
    return [f"gate after every stage: {limits}; on_fail {gate.on_fail}{early}"]


def keep_lines(keep: KeepConfig | None) -> list[str]:
    """The budget, in a line."""
    if keep is None:
        return []
    budgets = ", ".join(f"{key} {limit}" for key in ("general", "tasks") if (limit := getattr(keep, key)) is not None)
    return [f"budget that training keeps: {budgets}; on_fail {keep.on_fail}"]


def model_bytes(setup: Setup) -> int:
    """Bytes of the model's weights, from its shapes alone."""
    config = setup.config.model
    kind = str(getattr(load_model_config(config), "dtype", None)) if config.dtype == "stored" else config.dtype
    width = 2 if kind.endswith("bfloat16") else 4
    return width * sum(p.numel() for p in shapes(config).parameters())
