"""DualPrompt: prefixes for all tasks, prefixes for each task, and keys by which a row finds those of its task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from holdfast.api.method import Method
from holdfast.api.rows import Batch, TokenRow, learned
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.methods.parts.queries import prompt_queries
from holdfast.tuners.prompt_keys import nearest, similarity

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation
    from holdfast.tuners.dual_prefix import DualPrefixModel

FIRST_ROWS = 32
"""Train rows whose mean query is a key's first value."""


class DualPrompt(Method):
    """DualPrompt (Wang et al., 2022, arXiv 2204.04799): general prefixes, and prefixes of each task, found by a key.

    L = L_task + strength * mean over rows x of (1 - cos(q(x), k_t))
    at test time, x is answered with the prefixes e_t of the task t = argmax_t cos(q(x), k_t)

    L_task trains the general prefixes g, and e_t of the current task; the other term trains only the task's key k_t.
    q(x) is the frozen model's mean last hidden state over the prompt's tokens. Prefixes and keys are those of the tuner
    `dual_prefix`. No task is known at test time.
    """

    name = "dual_prompt"
    causal_only = "its prefixes are placed in the layers of one stack of decoder blocks"
    tuners = ("dual_prefix",)
    tuners_reason = "it trains that tuner's prefixes and keys"

    class Options(Section):
        strength: float = Field(
            1.0, ge=0, description="lambda, weight of the key's term; 0: no keys, one prefix for all tasks"
        )

    options: Options

    @property
    def lacks(self) -> str:
        chooses = "chooses, for each prompt, a task's prefixes by their keys: a plain library has no such choice"
        return chooses if self.options.strength else ""

    @property
    def needs_rows(self) -> bool:
        return self.options.strength > 0

    def before_stage(self, stage: Stage) -> None:
        prefixes = _prefixes(stage.model)
        prefixes.asks = self.options.strength > 0
        if prefixes.asks:
            rows = stage.sample(FIRST_ROWS, stage.random(self.name))
            model: Any = stage.model
            with model.disable_adapter():
                first = prompt_queries(model, rows, stage.collate, stage.micro_batch_size)
            [name] = [name for name, p in model.named_parameters() if p is prefixes.key.now]
            weights(model).load_({name: F.normalize(first, dim=-1).mean(0)})

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return (self.name,) if self.options.strength else ()

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        if not self.options.strength:
            return {}
        cosines = outputs.get("key_similarity")
        if cosines is None:
            raise ConfigError("data.packing: method 'dual_prompt' looks at each row's prompt alone; turn packing off")
        distance = (1 - cosines[: learned(batch)]).sum()
        return {self.name: self.options.strength * distance * step.micro_batches / step.rows}

    def after_stage(self, stage: Stage) -> None:
        prefixes = _prefixes(stage.model)
        if prefixes.asks:
            prefixes.finish()
        prefixes.asks = False

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        """Rows with the same nearest key are answered together; before the first task, without any prefixes."""
        model = _prefixes(evaluation.model)
        if not self.options.strength:
            yield range(len(rows))
        elif not model.tasks:
            with evaluation.model.disable_adapter():
                yield range(len(rows))
        else:
            tasks = self.tasks_of(evaluation, rows)
            for task in sorted(set(tasks)):
                with model.using(task):
                    yield [place for place, chosen in enumerate(tasks) if chosen == task]

    def tasks_of(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> list[int]:
        """t of each row: the finished task, from 0, whose key is nearest to the query of the row's prompt."""
        model: Any = evaluation.model
        with model.disable_adapter():
            queries = prompt_queries(model, rows, evaluation.collate, evaluation.batch_size)
        return nearest(similarity(queries, _prefixes(model).key.past.cpu()), 1)[:, 0].tolist()


def _prefixes(model: nn.Module) -> DualPrefixModel:
    from holdfast.tuners.dual_prefix import DualPrefixModel

    prefixes = getattr(model, "base_model", None)
    if not isinstance(prefixes, DualPrefixModel):
        raise ConfigError(
            "method 'dual_prompt': needs a model with prefixes in its attention layers: in a run the tuner "
            "dual_prefix; in Python model = holdfast.tuners.dual_prefix.DualPrefix().prepare(model)"
        )
    return prefixes
