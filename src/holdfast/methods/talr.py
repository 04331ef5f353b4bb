"""TALR: tokens that the model finds unlikely count less, the less the lower its loss has become."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import IGNORED, Batch
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.process import Process
from holdfast.engines.shards import Shards
from holdfast.losses.next_token import token_nll
from holdfast.system.shapes import of_shape

LEAST = 1e-6
"""The lowest temperature, in nats."""


class TALR(Method):
    """Token-adaptive loss reweighting (Lin et al., 2025, arXiv 2509.20758).

    L = - mean_t w_t log p_t, with w_t = max(p_t^(1 / tau), floor) without gradient. p^(1 / tau) is, up to a factor, the
    minimiser over the simplex of sum_t w_t l_t + tau sum_t w_t log w_t, with l_t = - log p_t. tau is the median over
    rows of a row's mean l_t; here over those of the last step, so that it does not depend on micro-batches.
    """

    name = "talr"
    reads_all_logits = False

    class Options(Section):
        floor: float = Field(0.01, ge=0, le=1, description="the least weight of a token; 1: every token counts 1")
        temperature: float | None = Field(
            None, gt=0, description="tau, in nats; absent: the median of the rows' mean losses in the last step"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tau = self.options.temperature or 0.0
        self.means: list[float] = []  # the mean loss of each of this process's rows in the step under way

    @property
    def is_off(self) -> bool:
        return self.options.floor == 1

    @property
    def needs_rows(self) -> bool:
        return not self.is_off and self.options.temperature is None

    def before_stage(self, stage: Stage) -> None:
        self.means = []
        if self.needs_rows:
            rows = stage.sample(stage.rows_a_step, stage.random(self.name))
            nats, tokens = stage.losses(rows)
            self._set([loss / count for loss, count in zip(nats, tokens, strict=True) if count])

    def loss_weights(self, step: Step, batch: Batch, outputs: Any) -> Tensor | None:
        if self.is_off:
            return None
        labels = batch["labels"]
        nll = token_nll(outputs.logits.detach(), labels)
        counts = (labels[:, 1:] != IGNORED).sum(1)
        if self.options.temperature is None:
            self.means += (nll.sum(1) / counts)[counts > 0].tolist()
        return nll.div(-self.tau).exp().clamp(min=self.options.floor)

    def after_step(self, step: Step, weights: Shards) -> None:
        if self.needs_rows:
            self._set([mean for part in Process.this().gather(self.means) for mean in part])
        self.means = []

    def watched(self) -> dict[str, float]:
        return {} if self.is_off else {f"{self.name}/temperature": self.tau}

    def state(self) -> State:
        return {"tau": self.tau}

    def load_state(self, state: State, model: nn.Module) -> None:
        self.tau = self.options.temperature or of_shape(float, state["tau"], "tau")

    def _set(self, means: Sequence[float]) -> None:
        """Take the temperature of the next step; without any row it stays."""
        if means:
            self.tau = max(statistics.median(means), LEAST)
