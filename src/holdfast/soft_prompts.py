"""The name under which exported model cards import what lies in :mod:`holdfast.tuners.soft_prompts`; kept for good."""

from holdfast.tuners.soft_prompts import *  # noqa: F403
