"""`holdfast evaluate`: a stage of a run measured again, in process or through an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    run: RunPath,
    stage: Stage = None,
    endpoint: Url = None,
    model: Model = None,
    key_variable: Key = "OPENAI_API_KEY",
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    retries: Retries = 8,
    output: Output = None,
) -> None:
    """Measure a stage again, beside what the run measured, in process or through an endpoint.

    The same command continues where one was stopped or killed, or where the endpoint failed, and asks nothing twice.
    """
    from rich.console import Console

    from holdfast.quiet import quieten

    quieten()
    from holdfast.cli.table import print_evaluated
    from holdfast.endpoint import Endpoint
    from holdfast.evaluate import evaluate as evaluate_stage

    asked = None
    if endpoint is not None:
        asked = Endpoint(
            endpoint,
            model or "",
            key_variable=key_variable,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
        )
    print_evaluated(evaluate_stage(run, stage=stage, endpoint=asked, output=output), Console())
