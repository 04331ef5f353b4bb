"""`holdfast serve`: a stage of a run behind an OpenAI-compatible server."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from holdfast.cli.evaluate import RunPath, Stage
from holdfast.cli.run import AcceptChanges, Trust
from holdfast.deploy.ports import listening


class Engine(StrEnum):
    """What answers."""

    transformers = "transformers"
    vllm = "vllm"


Follow = Annotated[
    bool, typer.Option("--follow", help="Always the stage that the run holds: a new one is loaded beside, then served.")
]
Host = Annotated[str, typer.Option(help="Address to listen at.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")]
EngineOption = Annotated[Engine, typer.Option("--engine", help="transformers, or vllm where it is installed.")]

MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Most tokens of an answer.", show_default="what the context holds"),
]
MaxRequests = Annotated[
    int | None,
    typer.Option(
        "--max-requests", min=1, help="Requests at once; more are refused with status 429.", show_default="256"
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option("--concurrency", min=1, help="Answers under way at once; further ones wait.", show_default="64"),
]
MaxPictures = Annotated[
    int | None,
    typer.Option("--max-pictures", min=1, help="Most pictures of a request.", show_default="16"),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", min=0.001, help="Seconds that a request may take.", show_default="600"),
]


def serve(
    run: RunPath,
    stage: Stage = None,
    follow: Follow = False,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    engine: EngineOption = Engine.transformers,
    max_tokens: MaxTokens = None,
    max_requests: MaxRequests = None,
    concurrency: Concurrency = None,
    timeout: Timeout = None,
    max_pictures: MaxPictures = None,
    accept_changes: AcceptChanges = False,
    trust: Trust = False,
) -> None:
    """Serve a stage's model at http://HOST:PORT/v1 until it is stopped: completions and chat completions."""
    from holdfast.records.read import read_run
    from holdfast.records.stages import stage_number
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    stage_number(read_run(run), stage)  # before the libraries are imported
    listening(host, port).close()
    from holdfast.deploy.openai.limits import Limits
    from holdfast.deploy.serve import serve as serve_stage

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "requests": max_requests,
        "concurrency": concurrency,
        "seconds": timeout,
        "pictures": max_pictures,
    }
    given = {name: value for name, value in options.items() if value is not None}
    serve_stage(
        run,
        stage=stage,
        follow=follow,
        host=host,
        port=port,
        engine=engine.value,
        limits=Limits(**given) if given else None,
        accept_changes=accept_changes,
        trust=trust,
    )
