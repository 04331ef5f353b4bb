"""The named terms of a stage's loss: their means in the log, and whether each of them contributes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from holdfast.api.method import Method
from holdfast.api.stage import Stage
from holdfast.engines.process import Process
from holdfast.errors import MethodError


class Terms:
    """The named terms of the loss between two lines of the log, and whether each declared one contributes."""

    def __init__(self, declared: Any = ()) -> None:
        self.declared = tuple(declared)
        self.contributed: set[str] = set()
        self.as_gradients: set[str] = set()
        self.steps = 0
        self._window = 0
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Any], mean: bool = True) -> None:
        """Add values: each is averaged over its additions (``mean``) or over the optimizer steps."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1 if mean else 0

    def step(self) -> None:
        """An optimizer step is done."""
        self.steps += 1
        self._window += 1

    def flush(self, process: Process) -> dict[str, float]:
        """Mean of every term since the last call, over all processes."""
        window = max(1, self._window)
        own = {name: float(s) / (self._counts[name] or window) for name, s in self._sums.items()}
        every = process.gather(own)
        names = dict.fromkeys(name for found in every for name in found)
        means = {f"term/{name}": sum(found.get(name, 0.0) for found in every) / process.world for name in names}
        self.contributed |= {name for name in names if means[f"term/{name}"] != 0}
        self._sums, self._counts, self._window = {}, {}, 0
        return means

    def check_gradient(self, stage: Stage, method: Method, name: str, term: Tensor) -> None:
        """MethodError if a term is not declared or has no gradient."""
        if name not in self.declared:
            raise MethodError(
                f"method {method.name!r} returned a loss term {name!r} that it did not declare for stage "
                f"{stage.index}; return it from declares(), so that holdfast can tell when it stops contributing"
            )
        if not term.requires_grad:
            raise MethodError(
                f"method {method.name!r}: its loss term {name!r} has no gradient, so it would change nothing; was it "
                "computed from detached tensors or under no_grad?"
            )

    def check(self, stage: Stage, process: Process) -> None:
        """MethodError if a declared term was exactly zero, or absent, for the whole stage.

        One step proves nothing: a penalty on the distance from the start is zero there.
        """
        self.flush(process)
        missing = [name for name in self.declared if name not in self.contributed]
        if missing and self.steps > 1:
            raise MethodError(
                f"stage {stage.index} ({stage.task}): the declared loss term {missing[0]!r} was exactly zero, or never "
                f"returned, in all {self.steps} steps: the method did nothing"
            )
