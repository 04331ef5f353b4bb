"""L2P: a pool of soft prompts, from which each row chooses by keys, in training and at test time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.api.method import Method, State
from holdfast.api.rows import Batch, TokenRow, learned
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.process import Process
from holdfast.engines.saved import saved_tensor
from holdfast.errors import ConfigError
from holdfast.tuners.soft_prompts import PromptPoolModel

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation


class L2P(Method):
    """Learning to Prompt (Wang et al., 2022, arXiv 2112.08654, equation 5): soft prompts from a pool, chosen by key.

    L = L_task + strength * mean over rows of sum_{k in K(x)} (1 - cos(q(x), k))

    K(x) are the keys of the row's prompts: the top_k with the smallest distance 1 - cos(q(x), k) (equation 3) or, in
    training with ``diversify``, with the smallest (1 - cos(q(x), k)) h_k, where h_k is the share of k in all choices of
    past stages (equation 4). q(x) is the frozen model's mean last hidden state over the prompt's tokens; the term
    trains only the keys. Prompts, keys and the choice are those of the tuner `prompt_pool`. No task is known at test
    time.
    """

    name = "l2p"
    causal_only = "its prompts are chosen and placed in the one sequence that a causal model reads"
    tuners = ("prompt_pool",)
    tuners_reason = "it trains that tuner's prompts and keys"
    lacks = (
        "chooses, for each prompt, soft prompts from a pool: here is the pool, which a plain library does not choose "
        "from"
    )

    class Options(Section):
        strength: float = Field(0.5, ge=0, description="lambda, weight of the keys' term; 0 turns the method off")
        diversify: bool = Field(
            True, description="in training, prefer prompts that past stages chose less often (equation 4)"
        )

    options: Options

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.past = torch.zeros(0, dtype=torch.int64)  # [size], how often past stages chose each prompt
        self.now = torch.zeros(0, dtype=torch.int64)  # [size], the same for this stage so far
        self.answers: dict[int, int] = {}  # the first place of each row's answer; see PromptPoolModel.remember

    @property
    def needs_rows(self) -> bool:
        return True

    def before_stage(self, stage: Stage) -> None:
        pool = _pool(stage.model)
        if not len(self.past):
            self.past = torch.zeros(pool.size, dtype=torch.int64)
        self.now = torch.zeros_like(self.past)
        self.answers |= pool.remember(stage.rows)
        diversify = self.options.strength and self.options.diversify and self.past.any()
        pool.frequency = self.past / self.past.sum() if diversify else None

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if self.options.strength else ()

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        rows = learned(batch)  # rehearsal rows may come after them
        self.now += torch.bincount(outputs["chosen"][:rows].flatten().cpu(), minlength=len(self.now))
        if not self.options.strength:
            return {}
        distance = (1 - outputs["key_similarity"][:rows]).sum()
        return {self.name: self.options.strength * distance * step.micro_batches / step.rows}

    def after_stage(self, stage: Stage) -> None:
        _pool(stage.model).frequency = None
        self.past += self._chosen()

    def _chosen(self) -> Tensor:
        """How often this stage chose each prompt so far, over all processes."""
        return Process.this().all_reduce_sum(self.now.clone())

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        """All rows are answered together, since the model chooses for each; it learns where a row's answer begins."""
        with _pool(evaluation.model).remembering(rows):
            yield range(len(rows))

    def state(self) -> State:
        answers = torch.tensor([*self.answers.items()], dtype=torch.int64).reshape(-1, 2)
        return {"past": self.past, "now": self._chosen(), "known": answers}

    def load_state(self, state: State, model: nn.Module) -> None:
        pool = _pool(model)
        past, now = (saved_tensor(state, key, None, kind="counts").clone() for key in ("past", "now"))
        if {len(past), len(now)} - {0, pool.size}:  # before the first stage they are empty
            raise ValueError(f"past and now: must be of the pool's {pool.size} prompts")
        self.past, self.now = past, now if Process.this().main else torch.zeros_like(now)
        self.answers = dict(saved_tensor(state, "known", None, 2, kind="integers").tolist())
        pool.prompt_lengths |= self.answers


def _pool(model: nn.Module) -> PromptPoolModel:
    if not isinstance(model, PromptPoolModel):
        raise ConfigError(
            "method 'l2p': needs a model with a pool of soft prompts: in a run the tuner prompt_pool; in Python "
            "model = holdfast.tuners.prompt_pool.PromptPool().prepare(model)"
        )
    return model
