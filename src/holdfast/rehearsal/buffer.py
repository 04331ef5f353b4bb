"""Samples of the model as it was before the stage, drawn while training runs, those of some steps together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Rehearsed, Stage
from holdfast.engines.pieces import is_divided
from holdfast.engines.process import Process
from holdfast.models.sampling import sample
from holdfast.rehearsal.request import OwnSample, Request
from holdfast.rehearsal.teacher import LiveStates, padded

HELD_OUT = 64
PROBE = 8  # tokens


class SampleBuffer:
    """So many samples a step, which depend on seed, stage and step alone; memory holds those of one round of steps.

    Processes that train together share a step's samples: together they have those that one would have alone. Where the
    weights lie in pieces they go through the model ``together``, so each of them draws them all.

    Args:
        before: the weights that the stage starts from.
        count: samples a step, of all processes.
        steps: of a round.
        hidden: whether the hidden states that the samples were drawn from are kept, as the teacher's: count * steps *
            length * hidden numbers in the model's data type.
    """

    def __init__(self, request: Request, before: LiveStates, seed: str, count: int, steps: int, hidden: bool):
        self.request, self.before, self.seed = request, before, seed
        self.count, self.steps, self.hidden = count, steps, hidden
        self._round = -1
        self._samples: dict[int, OwnSample] = {}
        self.together = is_divided(before.model)
        process = Process(0, 1) if self.together else Process.this()
        self._rank, self._world = process.rank, process.world

    def rows(self, step: int, count: int) -> tuple[list[TokenRow], list[int]]:
        """The first samples of a step, and the numbers by which :meth:`states` knows them.

        They are this process's share, unless ``together``.
        """
        number = step // self.steps
        if number != self._round:
            self._fill(number)
        numbers = self._own(step)[: len(range(self._rank, min(count, self.count), self._world))]
        return [self._samples[i].row for i in numbers], numbers

    def states(self, rehearsed: Rehearsed, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's hidden states [rows, seq, hidden] and their mask, without a row's last token."""
        found = [self._samples[i].hidden for i in rehearsed.samples]
        return padded([states for states in found if states is not None], rehearsed.hidden[0])

    def _fill(self, number: int) -> None:
        steps = range(number * self.steps, (number + 1) * self.steps)
        numbers = [i for step in steps for i in self._own(step)]
        self._samples = {}
        with self.before.in_place():
            samples = self.request.write(partial(sample, self.before.model), self.seed, numbers, self.hidden)
        self._samples = dict(zip(numbers, samples, strict=True))
        self._round = number

    def _own(self, step: int) -> list[int]:
        """The numbers of this process's samples of a step."""
        return list(range(step * self.count + self._rank, (step + 1) * self.count, self._world))


def held_out(request: Request, stage: Stage) -> list[TokenRow]:
    """Samples of the model as it is, which are never rehearsed."""
    draw = partial(sample, stage.model)
    return [own.row for own in request.write(draw, f"{stage.seed}/held out", range(HELD_OUT))]


def drawn_states_are_exact(request: Request, stage: Stage) -> bool:
    """Whether the hidden states that samples are drawn from are, up to rounding, those of a forward pass."""
    short = replace(request, turn=(), length=min(request.length, len(request.start) + PROBE))
    [own] = short.write(partial(sample, stage.model), "probe", [0], hidden=True)
    [expected] = stage.hidden_states([own.row])
    if own.hidden is None or own.hidden.shape != expected[:-1].shape:
        return False
    return bool((own.hidden - expected[:-1]).float().norm() <= 0.05 * expected[:-1].float().norm())
