"""AdaLoRA: low-rank updates whose ranks are cut down to a budget, where they matter least (PEFT's own)."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig
from peft.tuners.tuners_utils import BaseTuner
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.api.method import Method, State
from holdfast.api.stage import Stage, Step
from holdfast.api.tuner import TargetOptions
from holdfast.config.training import BaseTrainingConfig
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.models.seq2seq import task_type
from holdfast.tuners.peft import PeftTuner

if TYPE_CHECKING:
    from holdfast.engines.shards import Shards


class AdaLora(PeftTuner):
    """AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): singular triplets of updates, of which the best are kept.

    Over all stages of a run, the mean number of triplets in a layer falls from ``init_r`` to ``target_r``.
    """

    name = "adalora"
    config_class = AdaLoraConfig

    class Options(TargetOptions):
        """AdaLoRA's options; any other field of peft.AdaLoraConfig may be given by its name."""

        model_config = ConfigDict(extra="allow")

        init_r: int = Field(12, ge=2, description="rank of each layer's update at first")
        target_r: int = Field(8, ge=1, description="mean rank of the layers in the end")
        lora_alpha: float = Field(32, gt=0, description="the update is scaled by lora_alpha / init_r")
        lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input")
        target_modules: str | list[str] = Field(
            "all-linear", description="names of the layers to adapt; all-linear: every linear layer but the head"
        )
        tinit: int | float = Field(
            0.1, ge=0, description="steps at the full budget, over all stages; below 1: as a share of all steps"
        )
        tfinal: int | float = Field(
            0.4, ge=0, description="last steps, at the final budget; below 1: as a share of all steps"
        )
        deltaT: int = Field(1, ge=1, description="steps between allocations of the budget")  # noqa: N815 - PEFT's
        beta1: float = Field(0.85, gt=0, lt=1, description="average of importance over steps")
        beta2: float = Field(0.85, gt=0, lt=1, description="average of its uncertainty over steps")
        orth_reg_weight: float = Field(0.1, ge=0, description="gamma, weight of the triplets' orthogonality")
        total_step: int | None = Field(
            None, ge=1, description="optimizer steps of all stages; a run counts them itself"
        )

        @model_validator(mode="after")
        def _budget(self) -> AdaLora.Options:
            if self.target_r >= self.init_r:
                raise ValueError(f"target_r: {self.target_r} must be less than init_r, {self.init_r}")
            return self

    def plan(self, training: BaseTrainingConfig, steps: int) -> None:
        if self.options.total_step is None:
            self.options.total_step = steps or NEVER

    def config(self, model: PreTrainedModel) -> AdaLoraConfig:
        options = self.fields()
        steps = options["total_step"]
        if steps is None:
            raise ConfigError(
                "tuner adalora: total_step: outside of a run, say how many optimizer steps all stages take"
            )
        options |= {key: round(options[key] * steps) for key in ("tinit", "tfinal") if options[key] < 1}
        if steps - options["tfinal"] <= max(1, options["tinit"]):  # a step must tell what matters, first
            raise ConfigError(
                f"tuner adalora: tinit {options['tinit']} and tfinal {options['tfinal']} leave none of {steps} steps "
                "in which the budget could fall"
            )
        return AdaLoraConfig(task_type=task_type(model), **options)

    def wrap(self, model: PreTrainedModel, config: Any) -> Any:
        """PEFT's model without its term of the loss, which :class:`Allocation` adds instead."""
        wrapped = super().wrap(model, config)
        wrapped.base_model.forward = MethodType(BaseTuner.forward, wrapped.base_model)
        return wrapped

    def companion(self) -> Allocation:
        return Allocation(self.options.orth_reg_weight)


class Allocation(Method, registered=False):
    """AdaLoRA's part in training: a term keeps the triplets orthogonal, and each step allocates the budget anew.

        L = L_task + gamma / n * sum over the n factors P of |P P^T - I|_F    (A as it is, B transposed)

    PEFT's model adds this term to the loss of every micro-batch, so that accumulation would count it several times;
    here it counts once a step. Importance is PEFT's: averages over steps of |weight * gradient|, with the gradient
    before clipping.
    """

    name = "adalora"

    def __init__(self, orth_reg_weight: float) -> None:
        super().__init__()
        self.weight = orth_reg_weight
        self.steps = 0  # of all stages so far
        self.pattern: dict[str, list[bool]] | None = None  # the triplets that the last allocation kept, by layer
        self.tuner: Any = None  # PEFT's AdaLoraModel
        self.gradients: dict[str, Tensor] = {}  # whole gradients of this step, until the optimizer has stepped

    def before_stage(self, stage: Stage) -> None:
        model: Any = stage.model
        self.tuner = model.base_model

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return ("orthogonality",) if self.weight else ()

    @torch.no_grad()
    def after_backward(self, step: Step, gradients: Shards) -> dict[str, float]:
        logged = {}
        if self.weight:
            factors = {name: p for name, p in weights(step.stage.model).whole().tensors.items() if _is_factor(name)}
            total = 0.0
            for name, p in factors.items():
                rows = p if ".lora_A." in name else p.T
                distance = rows @ rows.T - torch.eye(len(rows), dtype=p.dtype, device=p.device)
                norm = distance.norm()
                slope = 2 * distance @ rows / norm.clamp(min=torch.finfo(p.dtype).tiny)
                slope = slope if ".lora_A." in name else slope.T
                gradients.add_whole_(name, slope, self.weight / len(factors))
                total += norm
            if step.logged:
                logged["orthogonality"] = self.weight * float(total) / len(factors)
        if self.steps + 1 < self._final:
            whole = gradients.whole().tensors
            self.gradients = {name: g.clone() for name, g in whole.items() if ".lora_" in name}
        return logged

    @torch.no_grad()
    def after_step(self, step: Step, weights: Shards) -> None:
        """PEFT's AdaLoraModel.update_and_allocate, for weights that an engine may divide."""
        self.steps += 1
        allocator, final = self.tuner.rankallocator, self._final
        whole = weights.whole().tensors
        named = [(_in_base(name), w) for name, w in whole.items()]
        factors = SimpleNamespace(named_parameters=lambda: named)
        if self.steps < final:
            self._weigh(whole)
        if self.steps > final:
            allocator.mask_using_rank_pattern(factors, self.pattern)
        else:
            budget, due = allocator.budget_schedule(self.steps)
            if due or self.steps == final:
                self.pattern = allocator.mask_to_budget(factors, budget)
        if self.steps == final:
            allocator.reset_ipt()
        weights.load_({name: w for name, w in whole.items() if ".lora_E." in name})

    def _weigh(self, weights: dict[str, Tensor]) -> None:
        """Average importance, and its variation, over steps (equations 9 and 10)."""
        averages, spreads = self.tuner.rankallocator.exp_avg_ipt, self.tuner.rankallocator.exp_avg_unc
        beta1, beta2 = self._config.beta1, self._config.beta2
        for name, gradient in self.gradients.items():
            key, importance = _in_base(name), (weights[name] * gradient).abs()
            average, spread = (d.get(key, torch.zeros_like(importance)) for d in (averages, spreads))
            averages[key] = beta1 * average + (1 - beta1) * importance
            spreads[key] = beta2 * spread + (1 - beta2) * (importance - averages[key]).abs()

    @property
    def _final(self) -> int:
        """The step of the last allocation."""
        return self._config.total_step - self._config.tfinal

    @property
    def _config(self) -> Any:
        return self.tuner.peft_config[self.tuner.trainable_adapter_name]

    def state(self) -> State:
        averages = {
            f"{kind}/{name}": value
            for kind in AVERAGES
            for name, value in (getattr(self.tuner.rankallocator, kind) if self.tuner else {}).items()
        }
        return {"steps": self.steps, "pattern": self.pattern} | averages

    def load_state(self, state: State, model: nn.Module) -> None:
        peft: Any = model
        self.tuner, self.steps, self.pattern = peft.base_model, int(state["steps"]), state["pattern"]
        self.tuner.rankallocator.reset_ipt()
        for name, p in self.tuner.model.named_parameters():
            if f"{AVERAGES[0]}/{name}" in state:
                for kind in AVERAGES:
                    getattr(self.tuner.rankallocator, kind)[name] = state[f"{kind}/{name}"].to(p.device)


NEVER = 10**9
"""Steps of a run that trains nothing: the budget does not change."""

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""PEFT's names of the average of importance over steps, and of the average of its uncertainty."""


def _in_base(name: str) -> str:
    """A parameter's name without the prefix of PEFT's model."""
    return name.removeprefix("base_model.model.")


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
