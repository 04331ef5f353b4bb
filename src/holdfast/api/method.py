"""The whole contract of a method: small verbs, all optional, and state that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Extra, Stage, Step
from holdfast.config.reading import validate
from holdfast.config.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdfast.api.at_test import Evaluation
    from holdfast.api.task import Example, Task
    from holdfast.engines.shards import Shards


State = dict[str, Any]
"""A method's memory: names to tensors (saved as safetensors) or plain values (saved as JSON)."""


class Method:
    """What is done against forgetting.

    A subclass sets ``name``, documents its paper and equation, and overrides the verbs that it needs. It never steps
    the optimizer, never unwraps the engine and never asks which engine it runs on.
    """

    name: ClassVar[str]
    schedule: ClassVar[Literal["sequence", "joint", "none"]] = "sequence"
    """sequence: a stage a task; joint: one stage over all tasks; none: no training."""

    tuners: ClassVar[tuple[str, ...]] = ()
    """The tuners that it works with, the default first; any where empty."""

    tuners_reason: ClassVar[str] = ""
    """Why it works with these alone."""

    default_tuner: ClassVar[str] = "lora"
    """The default of a method that works with any."""

    not_with: ClassVar[Mapping[str, str]] = {}
    """Methods, by name, with which it cannot be applied together, each with the reason."""

    reads_outputs: ClassVar[bool] = True
    """Whether :meth:`loss_terms` reads ``outputs``; some trainers make them only when they are asked to."""

    class Options(Section):
        """The method's options; a key that it does not know is refused."""

    registry: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        """Make the class known by its ``name``; with ``registered=False`` users cannot choose it (a companion)."""
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is None or not registered:
            return
        other = Method.registry.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two methods are called {name!r}: {other.__module__} and {cls.__module__}")
        Method.registry[name] = cls

    def __init__(self, **options: Any) -> None:
        """Raises ConfigError if an option is unknown or wrong."""
        self.options: Any = validate(self.Options, options, f"method {self.name}")

    def before_stage(self, stage: Stage) -> None:
        """Build what the stage needs: teacher, caches, constraints. The weights are still the last stage's."""

    def declares(self, stage: Stage) -> tuple[str, ...]:
        """Names of the loss terms that this stage will have. Each must contribute, or the run stops with an error."""
        return ()

    def extra_rows(self, step: Step) -> Extra | None:
        """Rows that go with this optimizer step."""
        return None

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Extra terms of the loss, each a scalar with gradient: the mean over this micro-batch.

        The trainer averages them over the micro-batches of the step and adds them to the task's loss.
        """
        return {}

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        """Change the accumulated gradient in place, before clipping; return values to log.

        A declared term that is added here as a gradient is returned with its value.
        """
        return {}

    def after_step(self, step: Step, weights: Shards) -> None:
        """See or change the weights in place, after the optimizer's step."""

    def final_weights(self, stage: Stage) -> None:
        """Change the weights that the stage ends with: these are measured, saved, and what the next stage starts from.

        It comes before any method's :meth:`after_stage`.
        """

    def after_stage(self, stage: Stage) -> None:
        """Update the memory. The weights are those that the stage ended with."""

    def ask(self, evaluation: Evaluation, task: Task, example: Example, fits: Callable[[Example], bool]) -> Example:
        """What the model is asked at test time instead of a test example, such as the same after some demonstrations.

        Args:
            fits: whether an example fits into the model's context with room for a response and nothing cut.
        """
        return example

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        """Make the model ready to answer test rows whose task is not known, some at a time.

        Yields the numbers of the rows that the model, as it then is, answers next; every row once. Until the next are
        asked for, these are answered; at the end, and when it is closed early, the model is as it was before.

        Args:
            rows: ``input_ids`` of a prompt, or, where only a likelihood is asked for, of prompt and answer together
                with ``labels``; :func:`holdfast.api.rows.prompt` gives what may be looked at.
        """
        yield range(len(rows))

    def state(self) -> State:
        """What must survive a restart: it is saved with every checkpoint and at the end of every stage."""
        return {}

    def load_state(self, state: State, model: nn.Module) -> None:
        """Take back what :meth:`state` gave; its tensors lie on the CPU."""
