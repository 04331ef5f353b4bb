"""DER++: dark experience replay, and the task loss on further samples of its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from holdfast.api.rows import Batch, count_supervised
from holdfast.api.stage import Extra, Rehearsed, Stage, Step
from holdfast.losses import prediction_nll, supervised_tokens
from holdfast.methods.der import DER


class DERpp(DER):
    """DER++ (Buzzega et al., 2020, arXiv 2004.07211, equation 6): dark experience replay with replay of the answers.

    L = CE(task) + weight * (the term of DER) + replay_weight * CE(replayed). The two terms have samples of their own,
    drawn from one memory.
    """

    name = "der_pp"
    not_with: ClassVar = {"der": "der_pp has the term of der"}

    class Options(DER.Options):
        ratio: float = Field(0.25, gt=0, le=100, description="replayed rows per task row, for each of the two terms")
        replay_weight: float = Field(0.5, ge=0, description="beta, the weight of the task loss on replayed rows")

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tokens = (0, 0)  # supervised tokens of each term's samples in the step under way

    def declares(self, stage: Stage) -> tuple[str, ...]:
        replay = (f"{self.name}/replay",) if len(self.memory) and self.options.replay_weight else ()
        return (*super().declares(stage), *replay)

    def extra_rows(self, step: Step) -> Extra | None:
        """Samples of DER's term; then those that are replayed, whose numbers begin after the memory's last one."""
        size, weights = len(self.memory), (self.options.weight, self.options.replay_weight)
        if not size or not any(weights):
            return None
        count = max(1, round(self.options.ratio * step.rows))
        places = [
            step.random(purpose).choices(range(size), k=count) if weight else []
            for purpose, weight in zip((self.name, f"{self.name}/replay"), weights, strict=True)
        ]
        dark, replayed = ([self.memory.rows[i] for i in part] for part in places)
        self.tokens = (sum(map(count_supervised, dark)), sum(map(count_supervised, replayed)))
        samples = [*places[0], *(size + i for i in places[1])]
        return Extra([*dark, *replayed], "beside", samples, logits="supervised")

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rehearsed = step.rehearsed.get(self.name)
        if rehearsed is None:
            return {}
        size = len(self.memory)
        dark = [i for i, sample in enumerate(rehearsed.samples) if sample < size]
        replayed = [i for i, sample in enumerate(rehearsed.samples) if sample >= size]
        terms: dict[str, Tensor] = {}
        if dark:
            part = _part(rehearsed, dark, self.tokens[0], step)
            terms |= super().loss_terms(replace(step, rehearsed={self.name: part}), batch, outputs)
        if replayed:
            part = _part(rehearsed, replayed, self.tokens[1], step)
            mean = prediction_nll(part.predictions(), part.labels).sum() / supervised_tokens(part.labels).clamp(min=1)
            terms[f"{self.name}/replay"] = self.options.replay_weight * part.share * mean
        return terms


def _part(rehearsed: Rehearsed, places: list[int], tokens: int, step: Step) -> Rehearsed:
    """Some of the rows of a micro-batch, as if they were all; ``tokens`` is how many such rows the whole step has."""
    part = rehearsed.of_rows(places)
    share = rehearsed.counts * step.micro_batches * int(supervised_tokens(part.labels)) / max(tokens, 1)
    return replace(part, share=share)
