"""Registers a tuner with PEFT as a type of its own."""

from __future__ import annotations

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

UNKNOWN = (
    "plain PEFT does not know tuner {name!r}: `import {module}` must come before `PeftModel.from_pretrained`, and vLLM "
    "and `transformers serve` do not load this folder"
)
"""What a folder of such a type lacks where plain libraries load it."""


def register(name: str, config: type, model: type) -> PeftType:
    """Register a tuner with PEFT, so that get_peft_model and PeftModel.from_pretrained take its configuration.

    PEFT registers members of its enumeration of types only, which is closed; so a member is added to it.

    Args:
        name: in lower case; the type's value is the same in upper case.
        config: a subclass of peft.PeftConfig.
        model: a subclass of peft.tuners.tuners_utils.BaseTuner; its ``prefix`` marks the names of its parameters.
    """
    kind = name.upper()
    member = str.__new__(PeftType, kind)
    member._name_, member._value_ = kind, kind
    PeftType._member_map_[kind] = PeftType._value2member_map_[kind] = member
    PeftType._member_names_.append(kind)
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)  # type: ignore[attr-defined]
    return member
