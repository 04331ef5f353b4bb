"""Router losses: they keep all experts of a MoE-LoRA in use, and the routers' logits small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from holdfast.api.method import Method
from holdfast.api.rows import Batch
from holdfast.api.stage import Stage, Step
from holdfast.config.section import Section
from holdfast.errors import ConfigError
from holdfast.tuners.moe_lora.layer import MoeLoraLinear


def load_balance(logits: Tensor, top_k: int | None = None) -> Tensor:
    """E sum_i f_i P_i (Switch Transformers, equations 4 to 6): 1 if tokens and probabilities are spread evenly.

    f_i is expert i's share of the tokens' choices, and P_i its mean probability, through which the gradient goes. If
    ``top_k`` is None, every token uses all experts; then f counts each token's likeliest expert.

    Args:
        logits: [tokens, experts].

    Returns:
        a scalar.
    """
    experts = logits.shape[-1]
    chosen = F.one_hot(logits.topk(top_k or 1).indices, experts).to(logits.dtype)  # [tokens, k, experts]
    return experts * (chosen.mean((0, 1)) * logits.softmax(-1).mean(0)).sum()


def router_z(logits: Tensor) -> Tensor:
    """mean over tokens of (log sum_i exp x_i)^2 (ST-MoE, equation 5), for logits [tokens, experts]; a scalar."""
    return logits.logsumexp(-1).square().mean()


class RouterLosses(Method, registered=False):
    """balance * sum_l load_balance(l) + router_z * sum_l router_z(l) over the routers l of the active MoE-LoRA.

    The tokens are those of the task's rows in the micro-batch, without padding. The tuner ``moe_lora`` adds it to a
    run; in your own trainer it is one of the methods: ``method=["replay", RouterLosses()]``.
    """

    name = "moe_lora"
    reads_outputs = False

    class Options(Section):
        balance: float = Field(0.01, ge=0, description="weight of the load-balance loss; Switch Transformer's alpha")
        router_z: float = Field(0.001, ge=0, description="weight of the router z-loss; ST-MoE's c_z")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._hooks: list[RemovableHandle] = []
        self._logits: list[tuple[Tensor, int | None]] = []  # each router's in the task's forward pass, with its top_k
        self._shape: Sequence[int] = ()  # rows and tokens of that pass
        self._waiting = self._watching = False

    def before_stage(self, stage: Stage) -> None:
        """Watch the routers in the task's forward pass, from its beginning to its end. Neither a recomputation in the
        backward pass nor another method's forward pass counts."""
        self.after_stage(stage)
        routers = [
            (layer.moe_lora_router[name], layer.top_k[name])
            for layer in stage.model.modules()
            if isinstance(layer, MoeLoraLinear)
            for name in layer.active_adapters
            if name in layer.moe_lora_router
        ]
        if not routers:
            raise ConfigError(
                "RouterLosses: the model has no active MoE-LoRA adapter, as peft.get_peft_model(model, "
                "holdfast.tuners.moe_lora.MoeLoraConfig(...)) makes it"
            )
        self._hooks = [router.register_forward_hook(self._watch(top_k)) for router, top_k in routers]
        self._hooks.append(stage.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(stage.model.register_forward_hook(self._end))

    def declares(self, stage: Stage) -> tuple[str, ...]:
        return tuple(f"{self.name}/{key}" for key, weight in self.options if weight)

    def extra_rows(self, step: Step) -> None:
        """The next forward pass is that of the step's first micro-batch."""
        self._waiting = True

    def loss_terms(self, step: Step, batch: Batch, outputs: Any) -> dict[str, Tensor]:
        """Raises ConfigError if the routers ran without gradient."""
        rows, tokens = batch["input_ids"].shape
        mask = batch.get("attention_mask")
        counted = torch.ones_like(batch["input_ids"]) if mask is None or mask.dim() != 2 else mask
        losses = dict.fromkeys(RouterLosses.Options.model_fields, torch.zeros((), device=counted.device))
        for logits, top_k in self._logits:
            if not logits.requires_grad:
                raise ConfigError(
                    "training.arguments.gradient_checkpointing_kwargs: use_reentrant hides the routers from their "
                    "losses; leave it out, or set the tuner's balance and router_z to 0"
                )
            of_tokens = logits.reshape(*self._shape, -1)[:rows, :tokens][counted.bool()]
            losses["balance"] = losses["balance"] + load_balance(of_tokens, top_k)
            losses["router_z"] = losses["router_z"] + router_z(of_tokens)
        self._logits, self._waiting = [], True
        return {f"{self.name}/{key}": weight * losses[key] for key, weight in self.options if weight}

    def after_stage(self, stage: Stage) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._logits, self._waiting = [], [], False

    def _begin(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._waiting:
            self._logits, self._shape = [], (args[0] if args else kwargs["input_ids"]).shape
            self._waiting, self._watching = False, True

    def _end(self, *args: Any) -> None:
        self._watching = False

    def _watch(self, top_k: int | None) -> Any:
        def watch(router: Any, args: Any, logits: Tensor) -> None:
            if self._watching:
                self._logits.append((logits, top_k))

        return watch
