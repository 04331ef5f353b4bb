"""The contract of a tuner: which weights are trained, and how they are saved so that plain libraries load them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from holdfast.api.registry import Registered
from holdfast.config.reading import validate
from holdfast.config.section import Section
from holdfast.models.kinds import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from holdfast.api.method import Method
    from holdfast.config.training import BaseTrainingConfig


class TargetOptions(Section):
    """The options of a tuner that can train any part of a model that sees."""

    target: Target = Field(
        "language", description="of a model that sees, what is trained: language, vision, projector or all"
    )


class Tuner(Registered, ABC):
    """Which weights are trained. A subclass sets ``name`` and ``folder`` and says how to prepare and load."""

    kind = "tuner"
    registry: ClassVar[dict[str, type[Tuner]]] = {}

    name: ClassVar[str]
    folder: ClassVar[str]
    """Name of the folder in a stage's directory that holds the trained weights."""

    quantized: ClassVar[bool] = True
    """Whether the model that it trains may be quantised, since its own weights stay as they are."""

    not_merged: ClassVar[str] = ""
    """Why its weights cannot be merged into a model of the same architecture; empty where PEFT merges them."""

    lacks: ClassVar[str] = ""
    """What its folder lacks where plain libraries load it, for a model card; empty where it lacks nothing."""

    causal_only: ClassVar[str] = ""
    """Why it trains no sequence-to-sequence model, after "and"; empty where it does."""

    text_only: ClassVar[str] = ""
    """Why it trains no model that sees, after "and"; empty where it does."""

    class Options(Section):
        """The tuner's options; a key that it does not know is refused."""

    def __init__(self, **options: Any) -> None:
        """Raises ConfigError if an option is unknown or wrong."""
        self.options: Any = validate(self.Options, options, f"tuner {self.name}")

    @property
    def frozen_base(self) -> bool:
        """Whether it leaves the model's own weights as they are, with these options, so that ``model.dtype: auto`` may
        hold them in bfloat16."""
        return self.quantized

    @property
    def served_by_vllm(self) -> bool:
        """Whether vLLM serves its adapter, with these options, beside the base model."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """Places in the model's context that it takes before every sequence."""
        return 0

    def plan(self, training: BaseTrainingConfig, steps: int) -> None:
        """Take note of how the run trains, before there is a model.

        Args:
            training: the settings of its stages.
            steps: optimizer steps of all stages together.

        Raises:
            ConfigError: it cannot train so.
        """

    def companion(self) -> Method | None:
        """What training with this tuner needs beyond its weights, such as a loss term or a step after the optimizer's.

        It is applied after the run's methods and is none of them: its class is a ``Method`` with ``registered=False``,
        and its ``name``, that of its terms and its state, is no method's.
        """
        return None

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> Any:
        """Make a pretrained model trainable, before the first stage."""

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Path) -> None:
        """Put weights that :meth:`save` wrote into a prepared model, in place."""

    def save(self, model: Any, folder: Path) -> None:
        """Write the trained weights so that plain transformers or PEFT loads them; all processes take part."""
        from holdfast.engines.process import Process
        from holdfast.engines.whole import saves_together, whole_state

        main, state = Process.this().main, whole_state(model)
        if state is None:
            model.save_pretrained(folder, is_main_process=main)
        elif main or saves_together(model):
            model.save_pretrained(folder, state_dict=state, is_main_process=main)
