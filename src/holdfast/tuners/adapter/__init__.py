"""Adapter: small bottleneck layers within each block are trained. Importing it registers the type with PEFT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from holdfast.api.tuner import TargetOptions
from holdfast.tuners.adapter.config import AdapterConfig
from holdfast.tuners.adapter.layer import AdapterLayer
from holdfast.tuners.adapter.model import AdapterModel
from holdfast.tuners.peft import PeftTuner
from holdfast.tuners.peft_types import UNKNOWN, register

__all__ = ["Adapter", "AdapterConfig", "AdapterLayer", "AdapterModel"]


class Adapter(PeftTuner):
    """Bottleneck adapters (Houlsby et al., 2019, arXiv 1902.00751), which are trained from stage to stage.

    Other placements: pfeiffer (Pfeiffer et al., 2020, arXiv 2005.00247) and parallel (He et al., 2022, arXiv
    2110.04366).
    """

    name = "adapter"
    config_class = AdapterConfig
    not_merged = "a non-linearity stands between its two matrices and the model's"
    lacks = UNKNOWN.format(name=name, module=__name__)

    class Options(TargetOptions):
        """The fields of :class:`AdapterConfig` of the same names."""

        placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
            "houlsby",
            description="houlsby: after attention and after the MLP; pfeiffer: after the MLP; parallel: beside the MLP",
        )
        bottleneck: int = Field(64, ge=1, description="m, units between the two projections of an adapter")
        non_linearity: str | None = Field(
            None, description="transformers' name of it; where absent, gelu for houlsby and relu for the others"
        )
        scale: float | None = Field(
            None,
            gt=0,
            description="s, what the adapter's output is multiplied by; where absent, 4 for parallel, else 1",
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the bottleneck's units")
        target_modules: str | list[str] | None = Field(
            None, description="names of the modules that get an adapter; where absent, found by placement"
        )
        exclude_modules: str | list[str] | None = Field(None, description="names of modules that get none")
        modules_to_save: list[str] | None = Field(
            None, description="names of modules that are trained in full and saved, such as layer norms"
        )

        @model_validator(mode="after")
        def _usable(self) -> Adapter.Options:
            AdapterConfig(**self.model_dump(exclude={"target"}))
            return self


register("adapter", AdapterConfig, AdapterModel)
