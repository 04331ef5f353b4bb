"""holdfast teaches a language model one task after another without it forgetting what it knew."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from holdfast.version import __version__

if TYPE_CHECKING:
    from holdfast.api.method import Method
    from holdfast.config.run import RunConfig, load_config
    from holdfast.report.status import status
    from holdfast.runner.learn.learn import learn
    from holdfast.runner.rebuild.rebuild import rebuild
    from holdfast.runner.rollback import rollback
    from holdfast.runner.run import run
    from holdfast.training.trainer import ContinualTrainer, continual

__all__ = [
    "ContinualTrainer",
    "Method",
    "RunConfig",
    "__version__",
    "continual",
    "learn",
    "load_config",
    "rebuild",
    "rollback",
    "run",
    "status",
]

_HOME = {
    "ContinualTrainer": "holdfast.training.trainer",
    "Method": "holdfast.api.method",
    "RunConfig": "holdfast.config.run",
    "continual": "holdfast.training.trainer",
    "learn": "holdfast.runner.learn.learn",
    "load_config": "holdfast.config.run",
    "rebuild": "holdfast.runner.rebuild.rebuild",
    "rollback": "holdfast.runner.rollback",
    "run": "holdfast.runner.run",
    "status": "holdfast.report.status",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import holdfast` and `holdfast --help` do not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
