"""The named terms of a stage's loss: their means in the log, and a check that each declared term contributes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from holdfast.api.method import Method
from holdfast.api.stage import Stage
from holdfast.engines.process import Process
from holdfast.errors import MethodError

logger = logging.getLogger("holdfast")


class Terms:
    """Sums of the loss's terms since the last line of the log, and which terms were ever different from zero.

    Attributes:
        declared: names of the terms that must contribute.
        may_rest: those of them that may be zero in a whole stage.
        may_be_absent: those of them that may never be returned in a whole stage.
        returned: names of the terms that methods returned.
        contributed: names of the terms whose mean was not zero in some line of the log.
        as_gradients: names of the declared terms that methods added to the gradient instead of the loss.
        steps: optimizer steps of the stage.
    """

    def __init__(
        self, declared: Iterable[str] = (), may_rest: Iterable[str] = (), may_be_absent: Iterable[str] = ()
    ) -> None:
        self.declared, self.may_rest = tuple(declared), frozenset(may_rest)
        self.may_be_absent = frozenset(may_be_absent)
        self.contributed: set[str] = set()
        self.returned: set[str] = set()
        self.as_gradients: set[str] = set()
        self.steps = 0
        self._window = 0
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Any], mean: bool = True) -> None:
        """Add values, by name. The log shows their mean over the additions (``mean``) or over the optimizer steps."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1 if mean else 0

    def step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1
        self._window += 1

    def flush(self, process: Process) -> dict[str, float]:
        """Return the mean of every term since the last call, over all processes, as ``term/<name>``; start again."""
        window = max(1, self._window)
        local = {name: float(total) / (self._counts[name] or window) for name, total in self._sums.items()}
        ranks = process.gather(local)
        names = dict.fromkeys(name for rank in ranks for name in rank)
        means = {f"term/{name}": sum(rank.get(name, 0.0) for rank in ranks) / process.world for name in names}
        self.returned |= names.keys()
        self.contributed |= {name for name in names if means[f"term/{name}"] != 0}
        self._sums, self._counts, self._window = {}, {}, 0
        return means

    def check_gradient(self, stage: Stage, method: Method, name: str, term: Tensor) -> None:
        """Check one term that a method returned.

        Raises:
            MethodError: the term is not declared or has no gradient.
        """
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

    def remember(self, lines: Iterable[Mapping[str, Any]], steps: int) -> None:
        """Take over what the lines of the log say of steps before this process: it continues a stage.

        Args:
            steps: of the stage by now.
        """
        for line in lines:
            terms = {key.removeprefix("term/"): value for key, value in line.items() if key.startswith("term/")}
            self.returned |= terms.keys()
            self.contributed |= {name for name, value in terms.items() if value}
        self.steps = steps

    def check(self, stage: Stage, process: Process) -> None:
        """Check at the end of a stage that every declared term contributed.

        A stage of two steps is not checked: a penalty on the distance from the start is zero in the first, and in the
        second, too, where warm-up begins with a learning rate of 0.

        Raises:
            MethodError: a declared term was exactly zero, or absent, in all steps.
        """
        self.flush(process)
        zero = [name for name in self.declared if name not in self.contributed]
        resting = [name for name in zero if name in self.may_rest and name in self.returned]
        missing = [name for name in zero if name not in resting and name not in self.may_be_absent - self.returned]
        for name in resting:
            logger.warning(
                "stage %d (%s): the loss term %r was exactly zero in all %d steps: the weights moved so little that "
                "the method did nothing; a smaller margin or a higher learning rate would let it act",
                *(stage.index, stage.task, name, self.steps),
            )
        if missing and self.steps > 2:
            raise MethodError(
                f"stage {stage.index} ({stage.task}): the declared loss term {missing[0]!r} was exactly zero, or never "
                f"returned, in all {self.steps} steps: the method did nothing"
            )
