"""`holdfast doctor`: what this machine can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.company import refuse
from holdfast.system.terminal import open_console, say

if TYPE_CHECKING:
    from rich.table import Table

    from holdfast.training.memory_estimate import Memory


class Precision(StrEnum):
    """Values of ``training.precision``."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[str | None, typer.Argument(help="Say which tuners fit here for this model.", show_default=False)]
Rows = Annotated[int, typer.Option("--batch-size", min=1, help="Rows in one micro-batch.")]
Length = Annotated[int, typer.Option("--max-length", min=8, help="Tokens of a row.")]
InPrecision = Annotated[Precision, typer.Option("--precision", help="As training.precision; auto: model.dtype, too.")]
Only = Annotated[str | None, typer.Option("--tuner", help="Only this one.", show_default="all")]


def doctor(
    context: typer.Context,
    model: Model = None,
    batch_size: Rows = 8,
    max_length: Length = 512,
    precision: InPrecision = Precision.auto,
    tuner: Only = None,
) -> None:
    """Show processor, memory, GPUs, versions and extras; with MODEL, which tuners fit into this machine's memory."""
    if model is None:
        refuse(context, "is about a model; give MODEL, too", "batch_size", "max_length", "precision", "tuner")
        _show_machine()
    else:
        _show_memory(model, batch_size, max_length, precision, tuner)


def _show_machine() -> None:
    import importlib.util
    from pathlib import Path

    from holdfast.models.precision import Machine
    from holdfast.system.machine import free_gib, hardware, versions

    machine = hardware()
    say(f"processor     {machine['cpu']}, {machine['cores']} cores")
    say(f"memory        {machine['memory_gib']} GiB")
    say(f"disk          {free_gib(Path.cwd()):.0f} GiB free here")
    say(f"GPUs          {', '.join(machine['gpus']) or 'none: training runs on the processor'}")
    say(f"bfloat16      {'yes' if Machine.this().bfloat16 else 'no: there are no instructions for it'}")
    for name, version in versions().items():
        say(f"{name:14}{version}")
    for module, use in EXTRAS.items():
        installed = importlib.util.find_spec(module) is not None
        say(f"{module:14}{'installed' if installed else 'not installed'}: {use}")


def _show_memory(model: str, rows: int, length: int, precision: Precision, only: str | None) -> None:
    from holdfast.config.model import ModelConfig
    from holdfast.config.section import Named
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    from holdfast import tuners
    from holdfast.errors import ConfigError
    from holdfast.models.precision import Machine, fastest_precision
    from holdfast.models.pretrained import load_model_config
    from holdfast.system.device import device_type, gpu_name
    from holdfast.training.memory_estimate import Estimate, advice, free_memory, heap_keeps_holes

    config = load_model_config(ModelConfig(name=model))
    shown = [tuners.build(Named(name=name)) for name in ([only] if only else tuners.known())]
    device = device_type()
    free = free_memory(device)
    memories: dict[str, Memory] = {}
    notes = []
    computed: set[str] = set()
    for tuner in shown:
        types = fastest_precision(Machine.this(), config, frozen=tuner.frozen_base)
        if precision is not Precision.auto:
            mixed = precision is Precision.bfloat16
            types = replace(types, weights="float32", computation="bfloat16" if mixed else "float32")
        computed.add(types.computation)
        try:
            estimate = Estimate(config, tuner, length, types.computation, device, types.weights)
            memory = memories[tuner.name] = estimate.memory(rows)
        except ConfigError as error:
            notes.append(f"{tuner.name}: {error}")
            continue
        if memory.peak() > free:
            change = advice(estimate, rows, free)
            notes.append(f"{tuner.name} would fit with {change}" if change else f"{tuner.name}: {LARGER}")
    unit, name = (2**30, "GiB") if any(m.peak() >= 2**30 for m in memories.values()) else (2**20, "MiB")
    where = gpu_name() if device != "cpu" else "main memory"
    asked = f"{rows} rows of {length} tokens, {' or '.join(sorted(computed))}"
    say(f"{model}: {asked}, sizes in {name}; {free / 2**30:.2f} GiB free ({where})")
    open_console(highlight=False).print(_memory_table(memories, unit, free))
    say("peak = weights + optimizer + holes + the larger of: activations + logits; gradients + the optimizer's step")
    if device == "cpu" and heap_keeps_holes():
        say(HEAP)
    for note in notes:
        say(note)


HEADINGS = (
    *("trained", "weights", "gradi-\nents", "optim-\nizer", "activa-\ntions", "recom-\nputed", "logits", "holes"),
    "peak",
)


def _memory_table(memories: Mapping[str, Memory], unit: int, free: float) -> Table:
    """A line a tuner.

    Args:
        memories: by tuner, in bytes.
        unit: bytes of a GiB or MiB, whichever is shown.
        free: bytes.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("tuner", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True, min_width=4)
    for tuner, memory in memories.items():
        sizes = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.checkpointed]
        cells = [
            "–" if size is None else f"{size / unit:.1f}"
            for size in [*sizes, memory.logits, memory.holes, memory.peak()]
        ]
        table.add_row(tuner, _count(memory.trained), *cells, "yes" if memory.peak() <= free else "no")
    return table


def _count(parameters: int) -> str:
    """12345678 as 12.3M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.1f}{letter}"
    return str(parameters)


LARGER = (
    "does not fit, however small the micro-batch; shorter rows (data.max_length), tuner lora with model.quantization: "
    "4bit, or a smaller model would take less"
)

HEAP = (
    "holes: in glibc's heap; with MALLOC_MMAP_THRESHOLD_=65536 in the environment there are none, and a step takes "
    "about a tenth longer"
)

EXTRAS = {
    "ray": "sweeps on a cluster, with holdfast sweep --ray",
    "optuna": "search of a strength, with search in a sweep",
    "wandb": "a tracker, with training.report_to: wandb",
    "mlflow": "a tracker, with training.report_to: mlflow",
    "tensorboard": "a tracker, with training.report_to: tensorboard",
    "trackio": "a tracker, with training.report_to: trackio",
    "flash_attn": "faster attention on GPUs, with model.attention: flash_attention_2",
    "uvicorn": "holdfast serve, with the extra serve",
    "vllm": "holdfast serve and replay, with --engine vllm",
    "lm_eval": "tasks of lm-evaluation-harness in evaluation.general, with the extra eval",
    "bitsandbytes": "frozen weights in 4 bits (QLoRA), with model.quantization: 4bit",
}
