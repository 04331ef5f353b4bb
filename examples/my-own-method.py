"""A method of your own in one file: a slow copy of the weights holds the fast ones back, over all stages.

    holdfast run RUN.yaml 'method={name: examples/my-own-method.py, pull: 0.05}'

docs/tutorials/my-own-method.md explains how such a file comes about, and how it is tested.
"""

from pydantic import Field

from holdfast.api import Method, Section, Shards, weights


class Tether(Method):
    """After each step: slow += rate (theta - slow), then theta += pull (slow - theta)."""

    name = "tether"

    class Options(Section):
        rate: float = Field(0.01, ge=0, le=1, description="how fast the slow weights follow")
        pull: float = Field(0.05, ge=0, le=1, description="how strongly they hold the fast ones; 0: not at all")

    def __init__(self, **options):
        super().__init__(**options)
        self.slow: Shards | None = None

    def before_stage(self, stage):
        if self.slow is None:
            self.slow = weights(stage.model).copy()

    def after_step(self, step, weights):
        self.slow.scale_(1 - self.options.rate).add_(weights, self.options.rate)
        weights.scale_(1 - self.options.pull).add_(self.slow, self.options.pull)

    def state(self):  # saved with every checkpoint, so that a killed run ends with the same numbers
        return {} if self.slow is None else self.slow.state("slow")

    def load_state(self, state, model):
        if state:
            self.slow = Shards.from_state(state, "slow", weights(model))
