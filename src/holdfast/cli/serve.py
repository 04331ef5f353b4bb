"""`holdfast serve`: a stage of a run behind an OpenAI-compatible server."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from holdfast.cli.evaluate import RunPath, Stage
from holdfast.cli.run import AcceptChanges, Trust


class Engine(StrEnum):
    """What answers."""

    transformers = "transformers"
    vllm = "vllm"


Host = Annotated[str, typer.Option(help="Address to listen at.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")]
EngineOption = Annotated[Engine, typer.Option("--engine", help="transformers, or vllm where it is installed.")]


def serve(
    run: RunPath,
    stage: Stage = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    engine: EngineOption = Engine.transformers,
    accept_changes: AcceptChanges = False,
    trust: Trust = False,
) -> None:
    """Serve a stage's model at http://HOST:PORT/v1 until it is stopped: completions and chat completions."""
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    from holdfast.deploy.serve import serve as serve_stage

    serve_stage(run, stage=stage, host=host, port=port, engine=engine.value, accept_changes=accept_changes, trust=trust)
