"""Keep a budget: multipliers weigh the rehearsal of a stage so that it ends within what may be lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from holdfast.api.method import Method, State
from holdfast.api.rows import TokenRow, bare, count_supervised
from holdfast.api.stage import Stage, Step
from holdfast.config.keep import KeepConfig
from holdfast.config.reading import validate
from holdfast.engines.pieces import reshard
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import snapshot, weights
from holdfast.errors import ConfigError
from holdfast.models.likelihood import token_losses
from holdfast.records.gate import Check, Increase
from holdfast.rehearsal.memory import Memory
from holdfast.rehearsal.multipliers import Lost, Multiplier, loss_rise, probability_fall
from holdfast.rehearsal.options import RehearsalOptions
from holdfast.system.shapes import of_shape

GENERAL = 0
"""The constraint on general samples; those on past tasks have the number of their stage."""

AIM = 0.8
"""The share of a budget that multipliers aim at, so that at the end of a stage nothing has to be given back."""

ENDLESS = 1e9
"""Nats that a loss which is not finite counts as, since a state holds finite numbers only."""

HALVINGS = 6
"""Measurements in the search for the share of an update that keeps the budget."""

SOURCES = {"general": ("general", "self"), "tasks": ("past",)}
"""The sources of rehearsal that each budget weighs."""

ADVICE = {
    "general": "a method that rehearses general or own samples beside the batch, such as gere_ce or kl_replay",
    "tasks": "a method that rehearses stored samples beside the batch, such as replay",
}


class Weighed(Protocol):
    """What a budget sees of a rehearsal method."""

    name: str
    options: RehearsalOptions
    held_out: Sequence[TokenRow]
    multipliers: dict[int, float] | None
    reserve: Callable[[Stage], Sequence[int]]
    measured: int | None


class Keep(Method, registered=False):
    """Training within a budget, by primal-dual steps (Elenter et al., 2023, arXiv 2310.00154).

    Minimise L_task(theta) subject to lost_k(theta) <= budget_k for general samples (k = 0) and each past task k. Each
    constraint has a :class:`.Multiplier`, which is the weight of the rehearsal of its samples. Every ``every`` steps,
    what was lost is measured on samples that are held out from rehearsal, and the multipliers take a dual step. At the
    end of a stage that is beyond its budget nevertheless, the weights are start + a * (end - start), with the largest a
    that was found to keep it.

    Attributes:
        lost: the last measurement, by constraint.
        verdict: of the last stage, as its record has it; None before the first.
    """

    name = "keep"

    def __init__(self, keep: KeepConfig | dict[str, Any], methods: Sequence[Method]):
        """
        Args:
            methods: those of the run, which it is applied together with.

        Raises:
            ConfigError: no method rehearses what a budget is about.
        """
        super().__init__()
        self.keep = keep if isinstance(keep, KeepConfig) else validate(KeepConfig, keep, "keep")
        self.weighed = {key: _weighed(key, methods) for key in SOURCES if getattr(self.keep, key) is not None}
        self.samples = Memory(2**31, "quota")  # what is measured: GENERAL's and each past task's
        self.base: list[float] = []  # nats of each sample, before training or at the end of its stage
        self.names: dict[int, str] = {}  # of past tasks, by stage
        self.multipliers: dict[int, Multiplier] = {}
        self.lost: dict[int, Lost] = {}
        self.verdict: dict[str, Any] | None = None
        self._start: Shards | None = None
        for method in self.weighed.get("general", ()):
            method.measured = self.keep.rows
        for method in self.weighed.get("tasks", ()):
            method.reserve = self.reserved

    def reserved(self, stage: Stage) -> Sequence[int]:
        """The places of the train rows that are held out from the rehearsal of a stage: at most a fifth, and none of
        fewer than ten rows, since one sample has no error."""
        count = min(self.keep.rows, len(stage.rows) // 5) if len(stage.rows) >= 10 else 0
        return sorted(stage.random(self.name).sample(range(len(stage.rows)), count))

    def before_stage(self, stage: Stage) -> None:
        if "general" in self.weighed and GENERAL not in self.samples.tasks:
            rows = [row for method in self.weighed["general"] for row in method.held_out][: self.keep.rows]
            if len(rows) < 2:
                raise ConfigError(
                    "keep.general: is measured on samples that are held out from rehearsal, one in five, and there "
                    f"are {len(rows)}; 10 general samples or more would do"
                )
            self._hold(GENERAL, rows, stage)
        self.multipliers = {k: Multiplier.start(self._share(k)) for k in self._constraints}
        self.lost = {}
        self._start = snapshot(stage.model) if self.keep.give_back and self.multipliers else None
        self._weigh()

    def after_step(self, step: Step, weights: Shards) -> None:
        if (step.index + 1) % self._every(step.stage) or not self.multipliers:
            return
        self.lost = self.measure(step.stage, step.random(self.name))
        for k, multiplier in self.multipliers.items():
            multiplier.update(self._excess(k, step), self.keep)
        self._weigh()

    def watched(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for k, lost in self.lost.items():
            prefix = f"{self.name}/{self.title(k)}"
            values |= {
                f"{prefix}/lost": lost.value,
                f"{prefix}/budget": lost.limit,
                f"{prefix}/multiplier": self.multipliers[k].value,
                f"{prefix}/weight": self.multipliers[k].weight,
            }
        return values

    def final_weights(self, stage: Stage) -> None:
        if not self.multipliers:
            self.verdict = {"constraints": [], "kept": True, "share": 1.0}
            return
        self.lost, share = self.measure(stage), 1.0
        if self._start is not None and self._worst(self.lost) > 0:
            share = self._give_back(stage)
        self._start = None
        kept = all(lost.kept for lost in self.lost.values())
        self.verdict = {"constraints": [self._record(k) for k in self.lost], "kept": kept, "share": share}

    def after_stage(self, stage: Stage) -> None:
        if "tasks" in self.weighed and (places := self.reserved(stage)):
            self.names[stage.index] = stage.task
            self._hold(stage.index, [stage.rows[place] for place in places], stage)

    def measure(self, stage: Stage, choice: Random | None = None) -> dict[int, Lost]:
        """What was lost under the current weights, by constraint; the same on every rank.

        Args:
            choice: chooses ``probe`` samples of each constraint. The error is that of all samples nevertheless, since a
                multiplier sums up many measurements. None: all are measured.
        """
        chosen = {k: self._places(k) for k in self.multipliers}
        shares = dict.fromkeys(chosen, 1.0)
        if choice is not None:
            few = {k: sorted(choice.sample(p, min(len(p), self.keep.probe))) for k, p in chosen.items()}
            shares = {k: (len(few[k]) / len(chosen[k])) ** 0.5 for k in chosen}
            chosen = few
        nats, tokens = _losses(stage, [self.samples.rows[i] for places in chosen.values() for i in places])
        lost, first = {}, 0
        for k, places in chosen.items():
            here = slice(first, first + len(places))
            first += len(places)
            before, now, limit = np.array([self.base[i] for i in places]), nats[here], self._limit(k)
            if k == GENERAL or self._budget(k).relative:
                lost[k] = loss_rise(before, now, tokens[here].astype(np.float64), limit)
            else:
                lost[k] = probability_fall(before, now, limit)
            lost[k] = replace(lost[k], error=shares[k] * lost[k].error)
        return lost

    def title(self, k: int) -> str:
        """What a constraint is called in the log: general, or tasks/NAME."""
        return "general" if k == GENERAL else f"tasks/{self.names[k]}"

    def state(self) -> State:
        return self.samples.state() | {
            "base": self.base,
            "names": [[k, name] for k, name in self.names.items()],
            "multipliers": [[k, m.first, m.value, m.weight] for k, m in self.multipliers.items()],
            "lost": [[k, lost.value, lost.error, lost.limit] for k, lost in self.lost.items()],
        }

    def load_state(self, state: State, model: nn.Module) -> None:
        self.samples.load_state(state, model)
        self.base = list(of_shape(list[float], state["base"], "base"))
        self.names = dict(_entries(tuple[int, str], state, "names"))
        four = tuple[int, float, float, float]
        self.multipliers = {k: Multiplier(*values) for k, *values in _entries(four, state, "multipliers")}
        self.lost = {k: Lost(*values) for k, *values in _entries(four, state, "lost")}
        self._weigh()

    def _excess(self, k: int, step: Step) -> float:
        """How far what was lost is above what may be lost now, or below what is aimed at; 0 between them."""
        above, below = (self.lost[k].excess(self.keep.margin, times) for times in (self._wider(step), AIM))
        return max(above, 0.0) + min(below, 0.0)

    def _wider(self, step: Step) -> float:
        """How many times its budget may be lost now: the first steps of a stage stir up much that settles again."""
        steps = step.stage.steps
        left = max(0.0, 1 - (step.index + 1) / steps) if steps else 0.0
        return AIM + self.keep.glide * left**2

    def _every(self, stage: Stage) -> int:
        return self.keep.every or max(1, (stage.steps or 200) // 20)

    @property
    def _constraints(self) -> list[int]:
        return sorted(set(self.samples.tasks))

    def _places(self, k: int) -> list[int]:
        return [i for i, task in enumerate(self.samples.tasks) if task == k]

    def _budget(self, k: int) -> Increase:
        limit = self.keep.general if k == GENERAL else self.keep.tasks
        assert limit is not None
        return Increase.read(limit)

    def _base_loss(self, k: int) -> float:
        """The loss that constraint k began with, in nats a token."""
        places = self._places(k)
        tokens = sum(count_supervised(self.samples.rows[i]) for i in places)
        return sum(self.base[i] for i in places) / tokens

    def _limit(self, k: int) -> float:
        """What may be lost of constraint k: nats a token, or a probability; above 0 even of what is known by heart."""
        return max(self._budget(k).nats(self._base_loss(k)), 1e-9)

    def _share(self, k: int) -> float:
        """The same as a share of the loss, or a probability."""
        budget = self._budget(k)
        return budget.amount if budget.relative or k != GENERAL else budget.amount / max(self._base_loss(k), 1e-9)

    def _hold(self, k: int, rows: Sequence[TokenRow], stage: Stage) -> None:
        """Keep samples to measure constraint k on, and what the model makes of them now."""
        rows = [bare(row) for row in rows]
        nats, _ = _losses(stage, rows)
        self.samples.rows += rows
        self.samples.tasks += [k] * len(rows)
        self.samples.places += range(len(rows))
        self.base += nats.tolist()

    def _weigh(self) -> None:
        """Tell the rehearsal methods their weights."""
        by_constraint = {k: multiplier.weight for k, multiplier in self.multipliers.items()}
        for key, methods in self.weighed.items():
            own = {k: weight for k, weight in by_constraint.items() if (k == GENERAL) == (key == "general")}
            for method in methods:
                method.multipliers = own

    def _worst(self, lost: dict[int, Lost]) -> float:
        return max(one.excess(self.keep.margin) for one in lost.values())

    def _give_back(self, stage: Stage) -> float:
        """Set the weights to start + a * (end - start), with the largest a found that keeps every budget.

        Where not even the start keeps them, the weights stay as they are.

        Returns:
            a; 1 where nothing was given back.
        """
        assert self._start is not None
        end, theta, at_end = snapshot(stage.model), weights(stage.model), self.lost
        theta.copy_(self._start)
        self.lost = self.measure(stage)
        if self._worst(self.lost) > 0:
            theta.copy_(end)
            self.lost = at_end
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            theta.copy_(_between(self._start, end, share))
            lost = self.measure(stage)
            if self._worst(lost) > 0:
                high = share
            else:
                low, self.lost = share, lost
        theta.copy_(_between(self._start, end, low))
        return low

    def _record(self, k: int) -> dict[str, Any]:
        lost, multiplier = self.lost[k], self.multipliers[k]
        return {
            "key": "general" if k == GENERAL else "tasks",
            "task": self.names.get(k),
            "lost": lost.value,
            "interval": lost.interval,
            "budget": lost.limit,
            "kept": lost.kept,
            "multiplier": multiplier.value,
            "samples": len(self._places(k)),
        }


def budget_checks(verdict: dict[str, Any]) -> list[Check]:
    """A check of each constraint of :attr:`Keep.verdict`, as the gate has them."""
    return [
        Check(f"max_lost_{one['key']}", f"budget of {_what(one)}", one["lost"], one["budget"], one["interval"])
        for one in verdict["constraints"]
    ]


def verdict_text(verdict: dict[str, Any]) -> str:
    """:attr:`Keep.verdict` in words, one line."""
    parts = []
    for one in verdict["constraints"]:
        low, high = one["interval"]
        kept = "kept" if one["kept"] else "not kept"
        parts.append(
            f"budget of {_what(one)} {kept}: lost {one['lost']:.4f} ({low:.4f} to {high:.4f}) of {one['budget']:.4f}"
        )
    if verdict["share"] < 1:
        parts.append(f"{100 * (1 - verdict['share']):.0f} % of the stage's update were given back for it")
    return "; ".join(parts) or "budget: there is no past task yet whose loss could be measured"


def _what(one: dict[str, Any]) -> str:
    return "general ability" if one["key"] == "general" else f"task {one['task']}"


def _weighed(key: str, methods: Sequence[Method]) -> list[Weighed]:
    """The methods whose rehearsal a budget weighs.

    Raises:
        ConfigError: there is none.
    """
    found = [
        cast(Weighed, method)
        for method in methods
        if hasattr(method, "multipliers")
        and method.options.source in SOURCES[key]
        and method.options.way == "beside"
        and (method.options.weight or method.options.ce_weight)
    ]
    if not found:
        names = ", ".join(method.name for method in methods)
        raise ConfigError(
            f"keep.{key}: a multiplier weighs rehearsal, and no method here does what it needs ({names}); name "
            f"{ADVICE[key]}, in method"
        )
    return found


def _losses(stage: Stage, rows: Sequence[TokenRow]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Nats and supervised tokens of each row, [rows]; a loss that is not finite counts as ``ENDLESS``."""
    nats, tokens = token_losses(cast(Any, stage.model), rows, batch_size=stage.micro_batch_size, pad_token_id=0)
    reshard(stage.model)  # so that Trainer empties the gradients of the shards, not of weights that are whole now
    return np.nan_to_num(nats, nan=ENDLESS, posinf=ENDLESS), tokens


def _between(start: Shards, end: Shards, share: float) -> Shards:
    """start + share * (end - start), computed in float32."""
    return start.like({name: t.float().lerp(end.tensors[name].float(), share) for name, t in start.tensors.items()})


def _entries(shape: Any, state: State, key: str) -> list[Any]:
    """The entries of a list of a method's state, each of which JSON holds as a list; ValueError if one is otherwise."""
    entries = of_shape(list[list[Any]], state[key], key)
    return list(of_shape(list[shape], [tuple(entry) for entry in entries], key))
