"""Keep other libraries from printing over the progress; warnings that matter are still shown."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import cache

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""The libraries' own switches, which they read when they are imported; a user's setting stands."""


def silence_libraries() -> None:
    """Turn off progress bars and notices of transformers, datasets and huggingface_hub; warnings of holdfast stay.

    None of them is imported for it.
    """
    for switch, value in QUIET.items():
        os.environ.setdefault(switch, value)
    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT warns of an entry that it made itself, for stacked experts, and that it does follow
    warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys [^,]*gate_up_proj'\]\.")
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)


@cache
def deduplicate_warnings() -> None:
    """Show each of holdfast's warnings once, even if many runs of this process give it."""
    shown: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        repeated = message in shown
        shown.add(message)
        return not repeated

    logging.getLogger("holdfast").addFilter(is_new)
