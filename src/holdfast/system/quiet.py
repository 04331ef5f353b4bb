"""Keep other libraries from printing over the progress lines; their warnings that matter are still shown."""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache


def silence_libraries() -> None:
    """Turn off progress bars and notices of transformers, datasets and huggingface_hub; warnings of holdfast stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT's own entry for stacked experts, which it does follow
    warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys [^,]*gate_up_proj'\]\.")
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)


@cache
def deduplicate_warnings() -> None:
    """Show each of holdfast's warnings once, where many runs have it."""
    seen: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        known = said in seen
        seen.add(said)
        return not known

    logging.getLogger("holdfast").addFilter(new)
