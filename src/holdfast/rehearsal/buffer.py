"""Samples of the model as it was before the stage, drawn while training runs, for several steps at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Rehearsed, Stage
from holdfast.engines.pieces import is_divided
from holdfast.engines.process import Process
from holdfast.models.sampling import sample
from holdfast.rehearsal.request import OwnSample, Prompts, Request
from holdfast.rehearsal.teacher import LiveStates, padded
from holdfast.system.progress import Show

HELD_OUT = 64
PROBE = 8  # tokens
WRITES = "the model writes samples of itself, to rehearse"


class SampleBuffer:
    """A fixed number of samples a step, which depend on seed, stage and step alone; memory holds one round of steps.

    Processes share a step's samples: all of them together have the samples of a single process. Where an engine divides
    the weights, processes go through the model ``together``, so each of them draws all samples.

    Args:
        before: the weights that the stage starts from.
        count: samples a step, of all processes.
        steps: of a round.
        hidden: whether to keep the hidden states that the samples were drawn from, as the teacher's: count * steps *
            length * hidden numbers in the model's data type.
        bar: of the stage.
    """

    def __init__(
        self,
        request: Request | Prompts,
        before: LiveStates,
        seed: str,
        count: int,
        steps: int,
        hidden: bool,
        bar: Show,
    ):
        self.request, self.before, self.seed = request, before, seed
        self._bar = bar
        self.count, self.steps, self.hidden = count, steps, hidden
        self._round = -1
        self._samples: dict[int, OwnSample] = {}
        self.together = is_divided(before.model)
        process = Process(0, 1) if self.together else Process.this()
        self._rank, self._world = process.rank, process.world

    def rows(self, step: int, count: int) -> tuple[list[TokenRow], list[int]]:
        """This process's share of the first ``count`` samples of a step, or all of these if ``together``.

        Returns:
            the samples, and the numbers by which :meth:`states` finds them.
        """
        number = step // self.steps
        if number != self._round:
            self._fill(number)
        numbers = self._numbers(step)[: len(range(self._rank, min(count, self.count), self._world))]
        return [self._samples[i].row for i in numbers], numbers

    def states(self, rehearsed: Rehearsed, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's hidden states [rows, seq, hidden] and their mask, without the last token of each row."""
        states = [self._samples[i].hidden for i in rehearsed.samples]
        return padded([hidden for hidden in states if hidden is not None], rehearsed.hidden[0])

    def _fill(self, number: int) -> None:
        steps = range(number * self.steps, (number + 1) * self.steps)
        numbers = [i for step in steps for i in self._numbers(step)]
        self._samples = {}
        with self.before.in_place(), self._bar(WRITES) as on_step:
            samples = _written(self.request, self.before.model, self.seed, numbers, on_step, self.hidden)
        self._samples = dict(zip(numbers, samples, strict=True))
        self._round = number

    def _numbers(self, step: int) -> list[int]:
        """The numbers of this process's samples in a step."""
        return list(range(step * self.count + self._rank, (step + 1) * self.count, self._world))


def held_out(request: Request | Prompts, stage: Stage) -> list[TokenRow]:
    """Samples of the model as it is now, which are never rehearsed."""
    with stage.bar(WRITES) as on_step:
        samples = _written(request, stage.model, f"{stage.seed}/held out", range(HELD_OUT), on_step)
    return [drawn.row for drawn in samples]


def _written(
    request: Request | Prompts,
    model: Any,
    seed: str,
    numbers: Sequence[int],
    on_step: Callable[[int, int], None],
    hidden: bool = False,
) -> list[OwnSample]:
    """Samples that are drawn together, token by token; ``on_step`` is told of how many."""
    tokens = itertools.count()

    def on_token() -> None:
        on_step(min(next(tokens), request.length), request.length)

    samples = request.write(partial(sample, model, on_token=on_token), seed, numbers, hidden)
    on_step(request.length, request.length)
    return samples


def drawn_states_are_exact(request: Request | Prompts, stage: Stage) -> bool:
    """Whether sampling and a forward pass give the same hidden states up to rounding."""
    [probe] = request.short(PROBE).write(partial(sample, stage.model), "probe", [0], hidden=True)
    [expected] = stage.hidden_states([probe.row])
    if probe.hidden is None or probe.hidden.shape != expected[:-1].shape:
        return False
    return bool((probe.hidden - expected[:-1]).float().norm() <= 0.05 * expected[:-1].float().norm())
