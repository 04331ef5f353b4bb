"""The head, the context and the begin token of a language model."""

from __future__ import annotations

import inspect
from dataclasses import make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from torch.func import functional_call

from holdfast.engines.pieces import for_compute, full, layout_of
from holdfast.errors import ConfigError
from holdfast.losses.chunked import Head
from holdfast.losses.common import wide

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head(model: PreTrainedModel | PeftModel) -> Head:
    """The output head of a language model.

    An adapter on it counts: the weight is then that of the whole layer, computed anew, with gradient to the adapter's
    parameters; its dropout does not act. Every process must ask for it.

    Raises:
        ConfigError: the head has an adapter of a kind that is no matrix.
    """
    inner: Any = base(model)
    layer = _active(inner.get_output_embeddings())
    if isinstance(layer, BaseTunerLayer):
        found = _with_adapter(layer)
    else:
        bias = getattr(layer, "bias", None)
        found = Head(for_compute(layer.weight), None if bias is None else for_compute(bias))
    more = _more_bias(inner)
    if more is not None:
        found = found._replace(bias=more if found.bias is None else found.bias + more)
    found = found._replace(**_bounds(model))
    if getattr(inner.config, "scale_decoder_outputs", False):  # T5 scales what the layer gets
        found = found._replace(logit_scale=inner.config.d_model**-0.5)
    return found


def _more_bias(inner: Any) -> Tensor | None:
    """What BART adds to the logits after the head's layer, [vocab]."""
    bias = getattr(inner, "final_logits_bias", None)
    return None if bias is None else bias[0]


def logits_of(model: PreTrainedModel | PeftModel, hidden: Tensor) -> Tensor:
    """The last layer's hidden states [..., hidden] -> the model's logits [..., vocab], float32 or wider.

    Within mixed precision a model's outputs are wider than its head's weights.
    """
    layer: Any = base(model).get_output_embeddings()
    return bounded(model, layer(hidden.to(layer.weight.dtype) if layer.weight.is_floating_point() else hidden))


def bounded(model: PreTrainedModel | PeftModel, logits: Tensor) -> Tensor:
    """What the head's layer gives -> the model's logits, float32 or wider."""
    found, more = Head(logits, **_bounds(model)).bounded(wide(logits)), _more_bias(base(model))
    return found if more is None else found + more


class _Bounds(TypedDict):
    logit_scale: float
    softcap: float | None


def _bounds(model: PreTrainedModel | PeftModel) -> _Bounds:
    """What comes after the head's layer, as the model's configuration says it."""
    config: Any = base(model).config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scales = [
        getattr(config, "logit_scale", None),  # Cohere
        getattr(config, "lm_head_multiplier", None),  # Falcon H1
        scaling if config.model_type.startswith("hyperclovax") else 1 / scaling if scaling else None,  # Granite divides
    ]
    scale = next((scale for scale in scales if scale is not None), 1.0)
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))  # Gemma, its kin
    return {"logit_scale": scale, "softcap": next((cap for cap in caps if cap is not None), None)}


def _active(layer: Any) -> Any:
    """The layer that acts: of modules_to_save, the trained copy."""
    if isinstance(layer, ModulesToSaveWrapper) and not layer.disable_adapters and layer.active_adapters:
        return layer.modules_to_save[layer.active_adapters[0]]
    return layer.original_module if isinstance(layer, ModulesToSaveWrapper) else layer


def _with_adapter(layer: Any) -> Head:
    """The weight and bias of a linear layer with an adapter that multiplies by a matrix."""
    if not isinstance(layer, LoraLayer | IA3Layer | OSFLayer) or _depends_on_tokens(layer):
        raise ConfigError(
            f"the model's head has an adapter ({type(layer).__name__}) that is no matrix, so that no loss can be built "
            "from the head; LoRA, AdaLoRA, IA3 and OSF can be on the head, or leave lm_head out of target_modules"
        )
    parameters = dict(layer.named_parameters())
    weight = layer.get_base_layer().weight
    units = torch.eye(layer.in_features, device=weight.device, dtype=weight.dtype)
    inputs = torch.cat([units, torch.zeros_like(units[:1])])
    training = [module for module in layer.modules() if module.training]
    layer.eval()
    with torch.autocast(weight.device.type, enabled=False):
        if layout_of(*parameters.values()).gathers_for_calls:
            rows = layer(inputs)
        else:
            rows = functional_call(layer, {name: full(for_compute(p)) for name, p in parameters.items()}, (inputs,))
    for module in training:
        module.training = True
    bias = rows[-1] if any(name.rpartition(".")[2] == "bias" for name in parameters) else None
    return Head((rows[:-1] if bias is None else rows[:-1] - bias).T, bias)


def _depends_on_tokens(layer: Any) -> bool:
    """Whether a LoRA layer acts on the tokens after an invocation alone (aLoRA)."""
    variants = getattr(layer, "lora_variant", {}).values()
    return any("ALora" in (kind if isinstance(kind, type) else type(kind)).__name__ for kind in variants)


def whole_head(model: PreTrainedModel | PeftModel) -> Head:
    """The output head in one piece, without gradient."""
    now = head(model)
    bias = None if now.bias is None else full(now.bias.detach())
    return now._replace(weight=full(now.weight.detach()), bias=bias)


def trained_head(model: PreTrainedModel | PeftModel) -> Head | None:
    """A copy of the head as it is now; None if it is not trained, and so never changes."""
    now = head(model)
    if not any(t is not None and t.requires_grad for t in (now.weight, now.bias)):
        return None
    now = whole_head(model)
    return now._replace(weight=now.weight.clone(), bias=None if now.bias is None else now.bias.clone())


def hidden_only(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Arguments of a forward pass for its hidden states alone: logits of one position only, if the model can do so."""
    takes_tail = "logits_to_keep" in inspect.signature(base(model).forward).parameters
    return {"logits_to_keep": 1} if takes_tail else {}


def context(model: PreTrainedModel | PeftModel) -> int | None:
    """Tokens that a model reads at most, without the places of soft prompts; None if its configuration does not say.

    A T5 could read more than its ``n_positions``, with which it was trained.
    """
    config = base(model).config.get_text_config()
    most = getattr(config, "max_position_embeddings", getattr(config, "n_positions", None))
    return None if most is None else most - getattr(model, "virtual_tokens", 0)


def begin_token(model: PreTrainedModel | PeftModel) -> int | None:
    """The begin token of a model's configuration; None if it names none."""
    return getattr(base(model).config.get_text_config(), "bos_token_id", None)


def with_tensors(outputs: Any, **tensors: Tensor) -> Any:
    """A model's outputs with further fields, which survive wrappers such as DDP that rebuild the outputs."""
    kind: Any = type(outputs)
    return _with_fields(kind, tuple(tensors))(**outputs, **tensors)


@cache
def _with_fields(outputs: type, names: tuple[str, ...]) -> type:
    return make_dataclass(outputs.__name__, [(name, Tensor | None, None) for name in names], bases=(outputs,))
