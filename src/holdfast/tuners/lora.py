"""LoRA: a low-rank update of every linear layer is trained (PEFT's own)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from pydantic import ConfigDict, Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.api.tuner import TargetOptions
from holdfast.errors import ConfigError, did_you_mean
from holdfast.tuners.lora_factors import SHAPE, TRAINED, Factors, exchange_adapters, factors, times_rank
from holdfast.tuners.peft import PeftTuner

FORMER_DROPOUT = 0.05
INITS = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4")
MOVES_BASE = re.compile(r"olora|pissa(_niter_\d+)?")


class Lora(PeftTuner):
    """Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685), one adapter that is trained from stage to stage."""

    name = "lora"
    config_class = LoraConfig

    class Options(TargetOptions):
        """LoRA's options; any other field of peft.LoraConfig may be given by its name."""

        model_config = ConfigDict(extra="allow")

        r: int = Field(16, ge=1, description="rank")
        lora_alpha: float = Field(32, gt=0, description="the update is scaled by lora_alpha / r")
        lora_dropout: Annotated[float, Field(ge=0, lt=1)] | Literal["former"] = Field(
            0.0,
            description="dropout on the adapter's input; former: the default of earlier runs, 0.05, or 0 where a "
            "Mixture-of-Experts' stacked experts are adapted, which take none",
        )
        target_modules: str | list[str] = Field(
            "all-linear", description="names of the layers to adapt; all-linear: every linear layer but the head"
        )
        use_dora: bool = Field(
            False, description="DoRA (arXiv 2402.09353): the norm of each output's weights is trained apart"
        )
        use_rslora: bool = Field(False, description="rsLoRA (arXiv 2312.03732): scaled by lora_alpha / sqrt(r)")
        init_lora_weights: bool | str = Field(
            True,
            description="true: an update of zero; pissa or pissa_niter_N (arXiv 2404.02948): the weights' r strongest "
            "singular triplets, exactly or by N iterations; also gaussian, orthogonal, olora",
        )

        @model_validator(mode="after")
        def _init(self) -> Lora.Options:
            init = self.init_lora_weights
            if isinstance(init, str) and init not in INITS and not MOVES_BASE.fullmatch(init):
                raise ValueError(f"init_lora_weights: {init!r} cannot be used{did_you_mean(init, INITS)}")
            return self

    @property
    def frozen_base(self) -> bool:
        """Nor where the factors begin with a part of the model's weights, which are the less by it."""
        return super().frozen_base and not MOVES_BASE.fullmatch(str(self.options.init_lora_weights))

    @property
    def served_by_vllm(self) -> bool:
        """vLLM serves the two factors alone."""
        options = self.fields()
        return not any(options.get(key) for key in ("use_dora", "modules_to_save", "lora_bias"))

    def wrap(self, model: PreTrainedModel, config: LoraConfig) -> PeftModel:
        moves_base = MOVES_BASE.fullmatch(str(config.init_lora_weights))
        former = config.lora_dropout == "former"
        if former:
            config.lora_dropout = 0.0
        try:
            wrapped: Any = MovedBase(model, config) if moves_base else get_peft_model(model, config)
        except (ValueError, AttributeError) as error:
            if not config.target_parameters:  # PEFT adds a Mixture-of-Experts' stacked weights to all-linear
                raise
            raise ConfigError(
                f"tuner lora: stacked experts take plain LoRA alone ({error}): leave lora_dropout, use_dora and "
                "init_lora_weights out, or name the layers to adapt in target_modules"
            ) from None
        if former:
            self._add_dropout(wrapped)
        return wrapped

    def _add_dropout(self, model: Any) -> None:
        """Give the adapter the former default's dropout, unless it adapts stacked experts, which take none."""
        config = model.peft_config[TRAINED]
        if config.target_parameters:
            return
        config.lora_dropout = FORMER_DROPOUT
        for layer in model.modules():
            if TRAINED in getattr(layer, "lora_dropout", ()):
                layer.lora_dropout[TRAINED] = nn.Dropout(FORMER_DROPOUT)

    def load(self, model: Any, folder: Path) -> None:
        """Take over the saved rank and scaling, too, which a method may have changed.

        Otherwise the adapter stays, since PEFT cannot delete one that has modules_to_save.
        """
        if not isinstance(model, MovedBase):
            saved: Any = LoraConfig.from_pretrained(str(folder))
            if any(getattr(saved, key) != getattr(model.peft_config[TRAINED], key) for key in SHAPE):
                exchange_adapters(model, {TRAINED: (saved, None)})
        super().load(model, folder)


class MovedBase(PeftModelForCausalLM):
    """LoRA that begins with factors of the weights themselves, which are subtracted from the weights (PiSSA, OLoRA).

        W x = (W - s B_0 A_0) x + s B_0 A_0 x  at first

    The update of the pretrained weights W is saved as a plain LoRA of twice the rank, [B, -B_0] [A; A_0], as PEFT does
    if it is given the first factors. So an adapter belongs to the pretrained model, whichever machine computed the
    factors, and loading it here restores A_0 and B_0.

    Attributes:
        start: A_0 and B_0.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig):
        super().__init__(model, config, TRAINED)
        self.start: Factors = {key: w.clone() for key, w in factors(self).items()}

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Write the adapter as one of plain LoRA, for plain PEFT and the pretrained model."""
        if not is_main_process:
            return
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        saved = get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=TRAINED)
        for key, start in self.start.items():
            saved[f"{key}.weight"] = _joined(key, saved[f"{key}.weight"], start)
        save_file(
            {key: w.detach().cpu().contiguous() for key, w in saved.items()},
            Path(save_directory, "adapter_model.safetensors"),
            metadata={"format": "pt"},
        )
        config: Any = times_rank(self.peft_config[TRAINED], 2)
        config = replace(config, init_lora_weights=True, inference_mode=True)
        config.base_model_name_or_path = self.get_base_model().name_or_path or None
        config.save_pretrained(str(save_directory))

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        saved = load_peft_weights(str(model_id), device="cpu")
        start: Factors = {}
        for key in self.start:
            saved[f"{key}.weight"], start[key] = _parted(key, saved[f"{key}.weight"])
        self._begin_at(start)
        return set_peft_model_state_dict(self, saved, adapter_name)

    @torch.no_grad()
    def _begin_at(self, start: Factors) -> None:
        """Subtract these first factors from the pretrained weights, instead of this machine's, which may differ."""
        start = {key: w.to(self.start[key]) for key, w in start.items()}
        if all(torch.equal(w, self.start[key]) for key, w in start.items()):
            return
        layers: Any = [module for module in self.modules() if TRAINED in getattr(module, "lora_A", ())]
        for sign, values in ((1, self.start), (-1, start)):
            for key, w in factors(self).items():
                w.copy_(values[key])
            for layer in layers:
                weight = layer.get_base_layer().weight
                weight.copy_(weight + sign * layer.get_delta_weight(TRAINED))
        self.start = start


def _joined(key: str, trained: Tensor, start: Tensor) -> Tensor:
    """A over A_0, or B beside -B_0."""
    return torch.cat([trained, start]) if key.endswith("lora_A") else torch.cat([trained, -start], dim=1)


def _parted(key: str, joined: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`_joined`."""
    if key.endswith("lora_A"):
        trained, start = joined.chunk(2)
        return trained, start
    trained, start = joined.chunk(2, dim=1)
    return trained, -start
