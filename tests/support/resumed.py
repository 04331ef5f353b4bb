"""Start, kill and finish runs in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

HERE = Path(__file__).parent


def start(config: Path, *point: object) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "killed.py"), str(config), *map(str, point)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> int:
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
    responses = {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.glob("stages/*/responses/*"))}
    return {
        "matrix": json.loads((directory / "matrix.json").read_text()),
        "weights": tensors(directory),
        "responses": responses,
        "steps": [(e["stage"], e["step"], e["terms"]) for e in events],
    }
