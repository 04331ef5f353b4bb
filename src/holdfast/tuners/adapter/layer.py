"""A module of a block with bottleneck adapters."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from holdfast.tuners.adapter.config import AdapterConfig


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module f that returns hidden states, with adapters by name. With x its input and h = f(x), it returns

        h + s up(sigma(down(h))),   or parallel:   h + s up(sigma(down(x)))

    where ``down`` is Linear(size, bottleneck) and ``up`` Linear(bottleneck, size). ``up`` begins at zero, so that an
    untrained adapter changes nothing. If several adapters are active, their sum is added.
    """

    adapter_layer_names = ("adapter_down", "adapter_activation", "adapter_up")
    other_param_names = ("adapter_dropout", "scale", "parallel")
    base_layer: nn.Module
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdapterConfig, size: int):
        super().__init__()
        self.base_layer = base_layer
        self.size = size
        self.adapter_down, self.adapter_up = nn.ModuleDict(), nn.ModuleDict()
        self.adapter_activation, self.adapter_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.parallel: dict[str, bool] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: AdapterConfig) -> None:
        """Add an adapter, on the device and in the data type of the module."""
        base = next(self.base_layer.parameters())
        dtype = base.dtype if base.is_floating_point() else None  # quantized weights are integers
        down = nn.Linear(self.size, config.bottleneck, device=base.device, dtype=dtype)
        up = nn.Linear(config.bottleneck, self.size, device=base.device, dtype=dtype)
        for tensor in (down.bias, *((up.weight, up.bias) if config.init_weights else ())):
            nn.init.zeros_(tensor)
        assert config.scale is not None
        self.adapter_down[adapter_name], self.adapter_up[adapter_name] = down, up
        self.adapter_activation[adapter_name] = ACT2FN[config.non_linearity].to(base.device, dtype)
        self.adapter_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.scale[adapter_name] = config.scale
        self.parallel[adapter_name] = config.placement == "parallel"
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with adapted hidden states, [..., size]."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = result = output[0] if isinstance(output, tuple) else output
        for name in self.active_adapters:
            if name in self.adapter_down:
                inputs = (args[0] if args else kwargs["hidden_states"]) if self.parallel[name] else hidden
                result = result + self._update(name, inputs).to(hidden.dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _update(self, name: str, inputs: Tensor) -> Tensor:
        down: Any = self.adapter_down[name]
        units = self.adapter_activation[name](down(self._cast_input_dtype(inputs, down.weight.dtype)))  # type: ignore[operator]
        return self.scale[name] * self.adapter_up[name](self.adapter_dropout[name](units))
