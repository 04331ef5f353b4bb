"""The contract of an evaluation: what a method may use of it at test time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from holdfast.api.rows import TokenRow


class Evaluation(Protocol):
    """A model that is being measured.

    Attributes:
        model: a language model, with or without adapters.
        batch_size: sequences in one forward pass.
        seed: of the run; a method's random choices at test time depend on it.
    """

    model: PreTrainedModel | PeftModel
    batch_size: int
    seed: int

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        """Pad rows on the right.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, int64 [rows, seq], on the model's device; the tokens of a
            row without labels are not supervised.
        """
