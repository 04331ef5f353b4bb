"""The base of PEFT's tuners: their options are fields of PEFT's configuration; preparing and loading are PEFT's."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig, get_peft_model
from pydantic import ConfigDict

from holdfast.api.tuner import Tuner
from holdfast.config.section import Section
from holdfast.errors import ConfigError, UserError, did_you_mean
from holdfast.models.kinds import Target, sees
from holdfast.models.parts import Parts
from holdfast.models.pretrained import readable
from holdfast.models.seq2seq import task_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("holdfast")


class PeftTuner(Tuner):
    """A tuner of PEFT's. A subclass names its configuration and gives defaults to the fields that matter."""

    folder = "adapter"
    config_class: ClassVar[type[PeftConfig]]

    class Options(Section):
        """Any other field of the PEFT configuration may be given by its name."""

        model_config = ConfigDict(extra="allow")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        ours = {field.name for field in dataclasses.fields(PeftConfig)} | {"inference_mode"}  # the run sets them
        fields = {field.name for field in dataclasses.fields(self.config_class) if field.init} - ours
        for key in self.options.model_extra or {}:
            if key not in fields:
                raise ConfigError(f"tuner {self.name}: {key}: unknown key{did_you_mean(key, fields)}")

    @property
    def frozen_base(self) -> bool:
        """Not where options of PEFT let weights of the model itself be trained, or decompose them."""
        options = self.fields()
        trained = [options.get(key) for key in ("modules_to_save", "trainable_token_indices", "use_dora")]
        return self.quantized and not any(trained) and options.get("bias", "none") == "none"

    def config(self, model: PreTrainedModel) -> Any:
        """The PEFT configuration for a model."""
        return self.config_class(task_type=task_type(model), **self.fields())

    def fields(self) -> dict[str, Any]:
        """The options that are fields of PEFT's configuration."""
        return self.options.model_dump(exclude={"target"})

    def wrap(self, model: PreTrainedModel, config: Any) -> Any:
        """The PEFT model."""
        return get_peft_model(model, config)

    def check_layers(self, model: PreTrainedModel) -> None:
        """Check the layers that ``target_modules`` names. Warns of those that the model lacks, beside others that it
        has. Of stacked experts PEFT knows other names, too, so that nothing is checked where there are any.

        Args:
            model: its weights are not looked at.

        Raises:
            ConfigError: it has none of them.
        """
        named = getattr(self.options, "target_modules", None)
        if not isinstance(named, list) or any(p.dim() == 3 for p in model.parameters()):
            return
        layers = [f".{name}" for name, _ in model.named_modules()]
        absent = [name for name in named if not any(layer.endswith(f".{name}") for layer in layers)]
        if not absent:
            return
        known = {name.rpartition(".")[2] for name, layer in model.named_modules() if _has_matrix(layer)}
        lacks = f"tuner {self.name}: target_modules: the model has no layer {', '.join(map(repr, absent))}"
        has = f"; it has {', '.join(sorted(known))}"
        if len(absent) == len(named):
            raise ConfigError(f"{lacks}{has}; all-linear names every linear layer but the head")
        logger.warning("%s, so that the others alone are adapted%s", lacks, has)

    def prepare(self, model: PreTrainedModel) -> Any:
        """Raises ConfigError if PEFT does not take these options, or not for this model."""
        left_out = ""
        self.check_layers(model)
        try:
            config = self.config(model)
            target: Target = getattr(self.options, "target", "all")
            if sees(model.config) and target != "all" and not getattr(config, "exclude_modules", None):
                config.exclude_modules = Parts(model).outside(target)
                left_out = f" (target={target} leaves out every other part of the model)"
            return self.wrap(model, config)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(f"tuner {self.name}: {error}{left_out}") from None

    def load(self, model: Any, folder: Path) -> None:
        """Raises ConfigError if the folder lacks weights of the adapter, which would stay as they began."""
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        try:
            with readable(f"{folder}: the adapter cannot be read"):
                report = model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
        except ConfigError as error:
            if isinstance(error.__cause__, KeyError):  # PEFT looks for a module to save, or a prompt, by its name
                raise ConfigError(f"{folder}: the adapter lacks {error.__cause__.args[0]}") from None
            raise
        prompts = model.peft_config[model.active_adapter].is_prompt_learning  # PEFT loads them past its report
        missing = [] if prompts else sorted(trained & set(report.missing_keys))
        if missing:
            raise ConfigError(f"{folder}: the adapter lacks {len(missing)} of its tensors: {', '.join(missing[:20])}")


def _has_matrix(layer: Any) -> bool:
    """Whether a module is a layer of one matrix, as PEFT adapts them, whatever library it is of."""
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.dim() == 2
