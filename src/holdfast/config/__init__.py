"""The configuration of a run: a file a section; unknown keys are refused with a near name."""

from holdfast.config.run import RunConfig, load_config
from holdfast.config.section import Section

__all__ = ["RunConfig", "Section", "load_config"]
