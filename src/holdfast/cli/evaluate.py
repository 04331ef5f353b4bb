"""`holdfast evaluate`: measure a stage of a run again, in process or through an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.company import refuse
from holdfast.cli.run import AcceptChanges, Trust
from holdfast.system.terminal import open_console

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.runner.evaluate import Remeasured

RunPath = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False, metavar="RUN")]
Stage = Annotated[
    int | None,
    typer.Option(
        "--stage", min=0, help="Which stage, from 1; 0: before training.", show_default="the one the run holds"
    ),
]
Url = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="Ask the model at this OpenAI-compatible endpoint.")
]
Model = Annotated[str | None, typer.Option("--model", help="Its name there.", show_default="the only one it serves")]
Key = Annotated[str, typer.Option("--key-variable", help="Environment variable that holds its key.")]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Requests under way at once.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds that a request may take.")]
Retries = Annotated[
    int, typer.Option("--retries", min=0, help="How often a request that failed is repeated, after growing pauses.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the responses.", show_default="RUN/evaluations/STAGE[-ENDPOINT]"),
]


def evaluate(
    context: typer.Context,
    run: RunPath,
    stage: Stage = None,
    endpoint: Url = None,
    model: Model = None,
    key_variable: Key = "OPENAI_API_KEY",
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    retries: Retries = 8,
    output: Output = None,
    accept_changes: AcceptChanges = False,
    trust: Trust = False,
) -> None:
    """Measure a stage again, in process or through an endpoint, and show the results beside the run's own.

    The same command continues an evaluation that was stopped or killed, or whose endpoint failed, and asks nothing
    twice.
    """

    from holdfast.records.read import read_run
    from holdfast.records.stages import stage_number
    from holdfast.system.quiet import silence_libraries

    if endpoint is None:
        asking = ("model", "key_variable", "concurrency", "timeout", "retries")
        refuse(context, "is about an endpoint; give --endpoint, too", *asking)
    silence_libraries()
    stage_number(read_run(run), stage)  # before the libraries are imported
    from holdfast.models.endpoint import Endpoint
    from holdfast.runner.evaluate import evaluate as evaluate_stage

    server = None
    if endpoint is not None:
        server = Endpoint(
            endpoint,
            model or "",
            key_variable=key_variable,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
        )
    results = evaluate_stage(
        run, stage=stage, endpoint=server, output=output, accept_changes=accept_changes, trust=trust
    )
    print_remeasured(results, open_console())


def print_remeasured(results: Remeasured, console: Console) -> None:
    """Print the scores beside those of the run, and how many responses differ."""

    from holdfast.report.terminal import narrow_table

    table = narrow_table("task")
    table.add_column("metric")
    for name in ("score", "in the run", "responses\nthat differ"):
        table.add_column(name, justify="right")
    shown = lambda value: "–" if value is None else f"{value:.3f}"  # noqa: E731
    for task, (now, before) in results.scores.items():
        changed = results.changed[task]
        differ = "–" if changed is None else str(changed)
        table.add_row(task, results.metrics[task], shown(now), shown(before), differ)
    for name, (now, before) in results.general.items():
        table.add_row(name, "general", shown(now), shown(before), "–")
    console.print(table)
    console.print(str(results.output), markup=False, soft_wrap=True)
