"""Every method's smallest useful case: options, tuner, and runs that several tests look at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from holdfast.methods import known
from support.tiny import tiny_config

GENERAL = "\n".join(f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw")


@dataclass(frozen=True)
class Case:
    """How a method is guarded.

    Attributes:
        options: what it is run with.
        off: options that switch it off, or why nothing does.
        flops: how many times the matrix arithmetic of `sequential` its second stage may take, all told.
        vectors: memory after two stages at most, in vectors of trainable parameters; rows come on top.
        margin: how much less than `sequential` it forgets at least; None where its page says that it need not, or where
            it needs another model or optimizer than this, which its own tests have.
        seeds: as a mean over how many it shows that; the slow tests take three.
        at_test: it acts on the responses, not (only) on the weights.
        training: how it must be trained to contribute and to forget less; at the rate of the other guards the first
            steps of a stage are so large that no gradient of the past says anything about them.
        tuner: instead of its own first one, or full.
    """

    options: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | str = field(default_factory=dict)
    flops: float = 1.01
    vectors: float = 0.0
    margin: float | None = 0.1
    seeds: int = 1
    at_test: bool = False
    training: dict[str, Any] = field(default_factory=lambda: {"epochs": 6})
    tuner: Any = None


GENTLE = {"epochs": 16, "learning_rate": 0.01}
GENTLER = {"epochs": 12, "learning_rate": 0.01}
LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0}
TEXTS, CORPUS = {"path": "GENERAL"}, {"path": "CORPUS"}
DRAWN = {"length": 12, "buffer": 2}
SILENT = {"weight": 0, "ce_weight": 0}
CASES: dict[str, Case] = {
    "a_gem": Case(off={"capacity": 0}, flops=2.1, margin=None, training=GENTLER),
    "cia": Case({"grouping": 0.9, "samples": 8}, {"strength": 0}, vectors=3, at_test=True),
    "clora": Case(off={"strength": 0}, flops=1.3, margin=None),
    "der": Case({"ratio": 1.0, "weight": 4.0}, {"weight": 0}, flops=2.2, vectors=2, training=GENTLE),
    "der_pp": Case(
        {"ratio": 1.0, "weight": 4.0}, {"weight": 0, "replay_weight": 0}, flops=3.3, vectors=2, training=GENTLE
    ),
    "dual_prompt": Case(off={"strength": 0}, flops=1.6, margin=None),
    "eaft": Case(off={"exponent": 0}, margin=None),
    "ewc": Case({"strength": 2e4, "samples": 8}, {"strength": 0}, flops=1.2, vectors=2, training=GENTLE),
    "flow": Case(off="it weighs every row", flops=1.4, margin=None),
    "gain_lora": Case(
        {"threshold": 0.5, "gate_threshold": 0.5, "gate_width": 8},
        "it always trains a branch and a gate",
        flops=2.0,
        vectors=3,
        margin=None,
    ),
    "gem": Case(off={"capacity": 0}, flops=2.1, margin=None, training=GENTLER),
    "gere": Case(TEXTS | {"weight": 10.0, "reduction": "mean"}, TEXTS | SILENT, flops=2.5, margin=None),
    "gere_ce": Case(TEXTS, TEXTS | {"weight": 0}, flops=2.5, margin=None),
    "gere_kl": Case(TEXTS, TEXTS | SILENT, flops=2.5, margin=None),
    "gere_l1": Case(TEXTS, TEXTS | SILENT, flops=2.5, margin=None),
    "gere_l2": Case(TEXTS, TEXTS | SILENT, flops=2.5, margin=None),
    "hide_lora": Case(
        off="training is that of sequential, and rows are always sorted by task",
        flops=1.2,
        vectors=3.2,
        margin=None,
        at_test=True,
        training={"epochs": 12, "learning_rate": 0.04},
        tuner=LORA,
    ),
    "inflora": Case(off="it always chooses A and trains B alone", flops=1.7, vectors=3, margin=None),
    "kl_dwn": Case(off={"weight": 0}, flops=1.5, margin=None),
    "kl_pre": Case(DRAWN, DRAWN | {"weight": 0}, flops=2.5, margin=None),
    "kl_replay": Case(CORPUS, CORPUS | {"weight": 0}, flops=2.5, margin=None),
    "l2p": Case(off={"strength": 0, "diversify": False}, flops=1.05, margin=None),
    "lfpt5": Case(
        {"samples": 2}, {"weight": 0, "kl_weight": 0, "lm_weight": 0}, flops=3.3, margin=None, tuner="prompt"
    ),
    "lines": Case({"alpha": 0.2}, {"alpha": 1.0}, margin=None),
    "lwf": Case(off={"weight": 0}, flops=1.5, margin=None),
    "mas": Case({"strength": 2.0, "samples": 8}, {"strength": 0}, flops=1.2, vectors=2, training=GENTLE),
    "mbpa": Case(
        {"neighbours": 8, "learning_rate": 0.3, "replay": 0.1},
        {"steps": 0, "replay": 0},
        flops=1.3,
        vectors=1.2,
        at_test=True,
    ),
    "mofo": Case(off={"fraction": 1.0}, margin=None),
    "n_lora": Case(off="it trains a new adapter in each stage, whatever its strength is", flops=1.3, margin=None),
    "ntp_pre": Case(DRAWN, DRAWN | {"weight": 0}, flops=2.5, margin=None),
    "o_lora": Case(off="it trains a new adapter in each stage, whatever its strengths are", flops=1.3, margin=None),
    "ogd": Case({"samples": 8, "capacity": 12}, {"capacity": 0}, flops=2.1, vectors=12.1, margin=None),
    "osf": Case(off="it always decomposes and projects", flops=1.3, margin=None, tuner="osf"),
    "rehearsal": Case({"loss": "kl"}, {"weight": 0}, flops=1.7, seeds=3),
    "replace": Case(DRAWN, "it replaces at least one row in a batch", flops=2.5, margin=None),
    "replay": Case({"ratio": 0.5}, {"weight": 0}, flops=1.6),
    "sdft": Case(
        {"shown": " ={demonstration}=", "max_new_tokens": 2},
        "it replaces the task's loss",
        flops=1.8,
        margin=None,  # the tiny model learns nothing from a demonstration
        training={},
    ),
    "self_replay": Case(CORPUS, CORPUS | {"weight": 0}, flops=2.5, margin=None),
    "seq_lora_merge": Case(off="it merges what its stages trained, and has no strength", vectors=3, margin=None),
    "si": Case({"strength": 1e4}, {"strength": 0}, vectors=2, training=GENTLE),
    "ssr": Case(
        {"samples": 4, "candidates": 12, "shots": 1, "input": "=", "output": "!", "temperature": 1.5, "top_p": 1.0},
        {"weight": 0},
        flops=3.0,
        vectors=1.1,
        margin=None,  # an untrained model writes few rows that look like the task's
    ),
    "talr": Case(off={"floor": 1.0}, flops=1.3, margin=None),
    "tree_lora": Case(off={"strength": 0}, vectors=2, margin=None),
    "wise_ft": Case({"alpha": 0.5}, {"alpha": 1.0}),
}
METHODS = {name: cls for name, cls in known().items() if cls.__module__.startswith("holdfast.")}
TRAINED = [name for name, cls in METHODS.items() if cls.schedule == "sequence" and name != "sequential"]


def case(name: str) -> Case:
    return CASES.get(name, Case())


def configuration(folder: Path, output: Path, name: str, options: Any, tuner: Any, seed: int, training: Any) -> Any:
    config = tiny_config(folder, method={"name": name} | with_paths(options, folder), seed=seed, output=str(output))
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": 3, "save_every": 100} | training
    del config["tuner"]
    return config | ({} if tuner is None else {"tuner": tuner})


def with_paths(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    files = {"GENERAL": "general.txt", "CORPUS": "corpus.jsonl"}
    return {key: str(folder / files[value]) if value in list(files) else value for key, value in options.items()}


def tuner_of(name: str) -> Any:
    """Without dropout, so that runs may be compared."""
    if case(name).tuner is not None:
        return case(name).tuner
    first = (METHODS[name].tuners or ("full",))[0]
    return LORA if first == "lora" else first


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    paths = [p for p in sorted(run.glob(f"stages/{stage}/**/*.safetensors")) if p.parent.name != "method"]
    return {f"{path.parent.name}/{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def responses(run: Path) -> list[str]:
    return [path.read_text() for path in sorted(run.glob("stages/*/responses/**/*.jsonl"))]


def terms(run: Path, stage: int) -> list[dict[str, float]]:
    events = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    return [event["terms"] for event in events if event["stage"] == stage]
