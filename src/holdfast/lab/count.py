"""Count what an experiment costs before it starts: parameters, tokens and FLOPs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from holdfast.errors import ConfigError
from holdfast.lab.experiment import Experiment, expand, resolve
from holdfast.lab.sources import data_of


@dataclass(frozen=True)
class Cost:
    """What a group of runs takes: ``tokens`` and ``flops`` are None where only a loss or the data's size decides."""

    group: str
    runs: int
    parameters: tuple[int, int]
    tokens: int | None
    flops: float | None


def check_experiment(experiment: Experiment) -> list[Cost]:
    """Validate every run of the grid without any data, and count what it would take.

    Returns:
        for each group: its runs, the least and the most parameters (embeddings counted once; 0 where the model is not
        made here), the most tokens trained on, and the operations, 6 x parameters x tokens, without rehearsal.

    Raises:
        ConfigError: a key of a run is wrong, or its method does not go with its tuner.
    """
    from holdfast import methods, tuners
    from holdfast.config.run import load_config
    from holdfast.lab.config import load_lab_config
    from holdfast.methods.compatibility import refusal

    if not experiment.runs:
        return []
    data = data_of(experiment.data, "experiment")
    files = {name: Path("tokens", name) for name in data.names()}
    costs: dict[str, list[tuple[int, float | None]]] = {name: [] for name in experiment.runs}
    sizes: dict[str, int] = {}
    for run in expand(experiment, data):
        try:
            resolved = resolve(run, files, Path("runs"))
            config = load_lab_config(resolved) if run.command == "pretrain" else load_config(resolved)
            chosen = methods.build([(method.name, method.options) for method in config.method])
            if config.tuner is not None:
                tuners.build(config.tuner)
                refused = [reason for method in chosen if (reason := refusal(method, config.tuner.name))]
                if refused:
                    raise ConfigError(f"tuner: {refused[0]}")
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from None
        if run.command == "run" and run.parent is None:
            sizes[run.key] = 0
        elif run.parent is None:
            sizes[run.key] = _parameters(json.dumps(resolved["model"]), data.vocabulary(), resolved["context"])
        else:
            sizes[run.key] = sizes[run.parent.key]
        size = sizes[run.key]
        stop = resolved.get("stop", {})
        bounds = [stop.get("tokens", 0), stop.get("tokens_per_parameter", 0) * size]
        costs[run.group].append((size, min((bound for bound in bounds if bound), default=None)))
    return [_cost(group, runs) for group, runs in costs.items()]


@cache
def _parameters(size: str, vocab_size: int, context: int) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    from holdfast.lab.architecture import architecture, counted_parameters
    from holdfast.lab.config import SizeConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture(SizeConfig.model_validate_json(size), vocab_size, context)
        )
    return counted_parameters(model)


def _cost(group: str, runs: list[tuple[int, float | None]]) -> Cost:
    sizes = [size for size, _ in runs]
    bounded = [(size, tokens) for size, tokens in runs if tokens is not None]
    if len(bounded) < len(runs):
        return Cost(group, len(runs), (min(sizes), max(sizes)), None, None)
    tokens = round(sum(tokens for _, tokens in bounded))
    flops = sum(6.0 * size * tokens for size, tokens in bounded)
    return Cost(group, len(runs), (min(sizes), max(sizes)), tokens, flops)
