"""The contract of a method: small verbs, all optional, and state that can be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from holdfast.api.registry import Registered
from holdfast.api.rows import Batch, TokenRow
from holdfast.api.stage import Encode, Extra, Stage, Step
from holdfast.config.reading import validate
from holdfast.config.section import Section

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from holdfast.api.at_test import Evaluation
    from holdfast.api.task import Example, Task
    from holdfast.engines.shards import Shards


State = dict[str, Any]
"""A method's memory: names to tensors (saved as safetensors) or plain values (saved as JSON)."""


class Method(Registered):
    """A method against forgetting.

    A subclass sets ``name``, documents its paper and equation, and overrides the verbs that it needs. It never steps
    the optimizer, never unwraps the engine and never asks which engine it runs on.

    A subclass with options defines ``class Options(Section)``; the line ``options: Options`` tells a type checker.
    """

    name: ClassVar[str]
    schedule: ClassVar[Literal["sequence", "joint", "none"]] = "sequence"
    """sequence: one stage a task; joint: one stage over all tasks; none: no training."""

    tuners: ClassVar[tuple[str, ...]] = ()
    """The tuners that it works with, the default first; empty: any tuner."""

    tuners_reason: ClassVar[str] = ""
    """Why it works with these tuners only."""

    default_tuner: ClassVar[str] = "lora"
    """The default tuner of a method that works with any."""

    not_with: ClassVar[Mapping[str, str]] = {}
    """The methods that it cannot be applied together with, by name, each with the reason."""

    text_only: ClassVar[str] = ""
    """Why it works with no model that sees, after "and"; empty where it does."""

    causal_only: ClassVar[str] = ""
    """Why it works with no sequence-to-sequence model, after "and"; empty where it does."""

    no_checkpointing: ClassVar[str] = ""
    """Why it cannot work where activations are recomputed in the backward pass; a run then refuses that."""

    turn: ClassVar[int] = 0
    """Methods that are applied together are called by their turns, those of one turn in the list's order, which then
    changes no more than rounding and the draws of dropout. Below 0: reads the weights and the loss's gradient before
    others change them; 1: projects the gradient that the others have made; 2: sets the weights that a stage ends with,
    after all others."""

    reads_outputs: ClassVar[bool] = True
    """Whether :meth:`loss_terms` reads ``outputs``; some trainers compute them only on request."""

    reads_all_logits: ClassVar[bool] = True
    """Whether :meth:`loss_weights` or :meth:`loss_terms` read the logits of every position in ``outputs``. If no method
    does, the head may be applied to supervised tokens alone: the logits are then [supervised tokens, vocab], row by
    row, those that predict these tokens. :func:`holdfast.losses.next_token.supervised_logits` gives them either way."""

    inputs: ClassVar[tuple[str, ...]] = ("path",)
    """Options that name files or folders whose content the method reads: a run goes on only with the same content."""

    Options: ClassVar[type[Section]] = Section
    """The method's options; a key that it does not know is refused."""

    kind = "method"
    registry: ClassVar[dict[str, type[Method]]] = {}

    def __init__(self, **options: Any) -> None:
        """Raises ConfigError if an option is unknown or wrong."""
        self.options: Any = validate(self.Options, options, f"method {self.name}")

    @property
    def held_out(self) -> Sequence[TokenRow]:
        """Rows that the method never trains on, for example of general text; a trainer measures forgetting on them."""
        return ()

    @property
    def needs_rows(self) -> bool:
        """Whether it reads the task's rows (:attr:`Stage.rows`): tokens, with a label for each, of the next-token loss.

        A trainer whose rows are of another kind then refuses it before training.
        """
        return False

    @property
    def needs_dev(self) -> bool:
        """Whether it reads the task's dev split (:attr:`Stage.dev`); a run then refuses a task without one."""
        return False

    @property
    def needs_token_batches(self) -> bool:
        """Whether it works on the task's rows within a trainer's batches: it takes their places, compares what the
        model makes of them, or reads where their answers begin. A trainer whose batches are of another kind, as TRL's
        DPOTrainer, then refuses it.
        """
        return False

    @property
    def needs_rows_apart(self) -> bool:
        """Whether it needs every row in a sequence of its own; packed rows are then refused before training."""
        return False

    @property
    def needs_momentum(self) -> bool:
        """Whether it reads the optimizer's momentum (:attr:`Step.momentum`); a run then refuses one without it."""
        return False

    def plan(self, stages: int) -> None:
        """Take note of how many stages the run has, before there is a model; when it grows, more than before.

        Raises:
            ConfigError: the options do not suit so many.
        """

    def try_samples(self, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig, encode: Encode) -> None:
        """Try what the method rehearses, before there is a model: its files, and whether samples fit the context.

        Args:
            encode: makes rows of examples as those of the tasks are made.

        Raises:
            UserError: the first stage would be refused for it.
        """

    def try_rows(
        self,
        rows: Sequence[TokenRow],
        describe: Callable[[int], str],
        tokenizer: PreTrainedTokenizerBase,
        model_config: PretrainedConfig,
    ) -> None:
        """Try a task's train rows, before there is a model.

        Args:
            describe: how a message names a row, given by number from 0.

        Raises:
            UserError: the task's stage would be refused for one of them.
        """

    def before_stage(self, stage: Stage) -> None:
        """Prepare the stage: teacher, caches, constraints. The weights are those that the last stage ended with."""

    def declares(self, stage: Stage) -> tuple[str, ...]:
        """Names of the loss terms of this stage. Each must contribute, or the run stops with an error."""
        return ()

    def may_rest(self, stage: Stage) -> tuple[str, ...]:
        """Names of declared terms that may be exactly zero in a whole stage, as a margin that no activation leaves.

        The run warns and goes on.
        """
        return ()

    def may_be_absent(self, stage: Stage) -> tuple[str, ...]:
        """Names of declared terms that may never be returned in a whole stage, as nothing was lost that they keep."""
        return ()

    def watched(self) -> dict[str, float]:
        """Values of now for every line of the log, by name, beside the terms."""
        return {}

    def extra_rows(self, step: Step) -> Extra | None:
        """Rows that go with this optimizer step."""
        return None

    def loss_weights(self, step: Step, batch: Batch, outputs: Any) -> Tensor | None:
        """Weights in the task's loss, which becomes the sum of weight times negative log-likelihood over its tokens.

        The sum is divided by what the plain loss is divided by, the number of supervised tokens in the step: weights
        are not normalised. Those of several methods are multiplied. They get no gradient. Rehearsal rows beside the
        batch have none; those that replace task rows do.

        Args:
            batch: the task's rows of this micro-batch.
            outputs: ``logits``, [rows, seq, vocab], and what else the model returned for them; see
                :attr:`reads_all_logits`.

        Returns:
            [rows, seq], of the token in each place (its logits are those of the place before), or [rows]; None: all
            are 1.
        """
        return None

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Extra terms of the loss by name, each a scalar with gradient: the mean over this micro-batch.

        The trainer averages them over the micro-batches of the step and adds them to the task's loss.

        Args:
            batch: the task's rows of this micro-batch.
            outputs: what the model returned for them: ``logits``, and what else the model or the tuner adds; see
                :attr:`reads_outputs` and :attr:`reads_all_logits`.
        """
        return {}

    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        """Change the accumulated gradient in place, before clipping.

        Returns:
            values to log, by name; of a declared term whose gradient is added here, its value.
        """
        return {}

    def after_step(self, step: Step, weights: Shards) -> None:
        """Read or change the weights in place, after the optimizer's step."""

    def final_weights(self, stage: Stage) -> None:
        """Change the final weights of the stage. They are measured and saved, and the next stage starts from them.

        It is called before any method's :meth:`after_stage`.
        """

    def after_stage(self, stage: Stage) -> None:
        """Update the memory; the weights are those that the stage ended with."""

    def ask(self, evaluation: Evaluation, task: Task, example: Example, fits: Callable[[Example], bool]) -> Example:
        """Replace a test example before the model is asked, for example by the same one after some demonstrations.

        Args:
            fits: whether an example fits into the model's context uncut, with room for a response.
        """
        return example

    def at_test(self, evaluation: Evaluation, rows: Sequence[TokenRow]) -> Iterator[Sequence[int]]:
        """Adapt the model to test rows whose task is not known, some rows at a time.

        Args:
            rows: ``input_ids`` of a prompt; where a likelihood is measured, of prompt and answer, with ``labels``. A
                method may look at :func:`holdfast.api.rows.prompt` of a row only.

        Yields:
            the numbers of the rows that the adapted model answers next, every row once. These are answered before the
            generator continues; when it ends or is closed, the model is as it was before.
        """
        yield range(len(rows))

    @property
    def acts_at_test(self) -> bool:
        """Whether it changes the model or the prompt at test time, so that the weights alone do not say the answers."""
        return type(self).at_test is not Method.at_test or type(self).ask is not Method.ask

    @property
    def lacks(self) -> str:
        """What a plain library does not do at test time, for a model card; empty where the method does nothing there.

        It continues a sentence that begins with the method's name.
        """
        return "changes the model or the prompt at test time: a plain library does not" if self.acts_at_test else ""

    def state(self) -> State:
        """What a restart needs: saved with every checkpoint and at the end of every stage."""
        return {}

    def load_state(self, state: State, model: nn.Module) -> None:
        """Restore what :meth:`state` returned; its tensors lie on the CPU."""
