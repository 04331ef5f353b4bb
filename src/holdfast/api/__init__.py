"""The contracts of holdfast, and the one door for people who extend it: ``from holdfast.api import Method, ...``.

- A method against forgetting: :class:`Method` with its :class:`Section` of options, what it is given
  (:class:`Stage`, :class:`Step`, :class:`Rehearsed`, :class:`Evaluation`) and what it returns (:class:`Extra`,
  :data:`State`).
- A tuner: :class:`Tuner`. A metric: :class:`Scorer`, which reads a :data:`Record`.
- Data: :class:`Task`, :class:`Example` and :class:`Turn`; tokenised, :data:`TokenRow` and :data:`Batch`.
- Vectors over the trainable weights, on any engine: :class:`Shards`, :func:`weights`, :func:`gradients`,
  :func:`gradient_of`, :func:`snapshot`, :func:`borrowed`.
- What a user can mend: :class:`ConfigError`, :class:`DataError`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation
    from holdfast.api.method import Method, State
    from holdfast.api.rows import IGNORED, Batch, TokenRow, prompt
    from holdfast.api.scorer import Record, Scorer
    from holdfast.api.stage import Extra, Rehearsed, Stage, Step
    from holdfast.api.task import Example, Task, Turn
    from holdfast.api.tuner import Tuner
    from holdfast.config.section import Section
    from holdfast.engines.shards import Shards
    from holdfast.engines.vectors import borrowed, gradient_of, gradients, snapshot, weights
    from holdfast.errors import ConfigError, DataError

__all__ = [
    "IGNORED",
    "Batch",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Example",
    "Extra",
    "Method",
    "Record",
    "Rehearsed",
    "Scorer",
    "Section",
    "Shards",
    "Stage",
    "State",
    "Step",
    "Task",
    "TokenRow",
    "Tuner",
    "Turn",
    "borrowed",
    "gradient_of",
    "gradients",
    "prompt",
    "snapshot",
    "weights",
]

_HOME = {
    "IGNORED": "holdfast.api.rows",
    "Batch": "holdfast.api.rows",
    "ConfigError": "holdfast.errors",
    "DataError": "holdfast.errors",
    "Evaluation": "holdfast.api.at_test",
    "Example": "holdfast.api.task",
    "Extra": "holdfast.api.stage",
    "Method": "holdfast.api.method",
    "Record": "holdfast.api.scorer",
    "Rehearsed": "holdfast.api.stage",
    "Scorer": "holdfast.api.scorer",
    "Section": "holdfast.config.section",
    "Shards": "holdfast.engines.shards",
    "Stage": "holdfast.api.stage",
    "State": "holdfast.api.method",
    "Step": "holdfast.api.stage",
    "Task": "holdfast.api.task",
    "TokenRow": "holdfast.api.rows",
    "Tuner": "holdfast.api.tuner",
    "Turn": "holdfast.api.task",
    "borrowed": "holdfast.engines.vectors",
    "gradient_of": "holdfast.engines.vectors",
    "gradients": "holdfast.engines.vectors",
    "prompt": "holdfast.api.rows",
    "snapshot": "holdfast.engines.vectors",
    "weights": "holdfast.engines.vectors",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import holdfast.api` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'holdfast.api' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
