"""Defaults that have changed: a run that began with a former one goes on with it."""

from __future__ import annotations

from typing import Any

DROPOUT = "former"
"""LoRA's dropout in runs that did not say which: their records lack it, and those of newer runs have it."""

STORED = "stored"
"""``model.dtype`` in runs that said auto, which meant the checkpoint's type; newer records have the type itself."""


def with_former_defaults(record: dict[str, Any]) -> dict[str, Any]:
    """Name in a run's record, in place, the defaults that were others when it began; all else stays.

    Args:
        record: the content of run.json; empty before a run begins. One of the laboratory, which has no tasks, stays.
    """
    if "tasks" in record:
        for config in (record["config"], *(stage["config"] for stage in record.get("stages", []))):
            model, tuner = config.get("model"), config.get("tuner")
            if isinstance(model, dict) and model.get("dtype") == "auto":
                model["dtype"] = STORED
            if isinstance(tuner, dict) and tuner.get("name") == "lora":
                tuner.setdefault("lora_dropout", DROPOUT)
    return record
