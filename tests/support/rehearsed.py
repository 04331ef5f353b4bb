"""Two stages of rehearsal."""

from __future__ import annotations

from support.tiny import tiny_model, tiny_rows, tiny_tokenizer
from support.trained import trained


def two_stages(folder, method, **args):
    """Train two stages and return the trainer; rows of the second differ from those of the first."""
    model = tiny_model()
    for index in (1, 2):
        rows = [row | {"row": i} for i, row in enumerate(tiny_rows(12, seed=index))]
        trainer = trained(
            folder,
            rows=rows,
            model=model,
            method=method,
            processing_class=tiny_tokenizer(),
            args={"max_grad_norm": 0} | args,
            stage_index=index,
        )
    return trainer
