"""Start, kill and finish runs in processes of their own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from safetensors.torch import load_file

from support import forked

HERE = Path(__file__).parent


def start(config: Path, *point: object) -> forked.Process:
    return forked.start(HERE / "killed.py", config, *point)


def finish(process: forked.Process) -> int:
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def tensors(directory: Path) -> dict[str, dict[str, bytes]]:
    """The weights and the methods' states of all stages: {file: {tensor: bytes}}."""
    return {
        str(path.relative_to(directory)): {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        for path in sorted(directory.glob("stages/*/*/*.safetensors"))
    }


def results(directory: Path) -> dict:
    """Everything that must not depend on an interruption: scores, weights, responses, and the logged losses."""
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    responses = {
        str(p.relative_to(directory)): p.read_text() for p in sorted(directory.glob("stages/*/responses/**/*.jsonl"))
    }
    return {
        "matrix": json.loads((directory / "matrix.json").read_text()),
        "weights": tensors(directory),
        "responses": responses,
        "steps": [(e["stage"], e["step"], e["terms"]) for e in events],
    }
