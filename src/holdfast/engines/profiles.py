"""The engines by name."""

from __future__ import annotations

from typing import Any

from holdfast.engines.fsdp2 import Fsdp2Profile
from holdfast.engines.profile import Profile
from holdfast.engines.zero.profile import DEEPSPEED, ZeroProfile, forget

PROFILES: dict[str, Profile] = {"ddp": Profile(), "fsdp2": Fsdp2Profile()}
PROFILES |= {name: ZeroProfile(name) for name in DEEPSPEED}


def profile_of(engine: str | None) -> Profile:
    """What ``training.engine`` names; absent: ddp."""
    return PROFILES[engine or "ddp"]


def check_engine(engine: str | None, optimizer: str = "adamw_torch") -> None:
    """ConfigError if what the engine needs is not installed, or the optimizer cannot train with it."""
    profile_of(engine).check(optimizer)


def loading_options(engine: str | None) -> dict[str, Any]:
    """Options of ``from_pretrained`` for the next model, whatever engine trained the last one in this process."""
    forget()
    return profile_of(engine).loading_options()
