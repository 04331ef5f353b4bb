"""transformers.Trainer with a next-token loss that never holds a batch's logits: equal in value, smaller and faster."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from holdfast.losses import chunked_next_token_nll
from holdfast.models.head import head, hidden_only


class ChunkedLossTrainer(Trainer):
    """Its loss is the mean over the step's supervised tokens of the negative log-likelihood, from the last hidden
    state and the head, a few hundred tokens at a time. No logits come back with the outputs."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_loss_func=self._next_token_loss, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        asked = {"output_hidden_states": True, "use_cache": False} | hidden_only(self.model)
        return super().compute_loss(model, inputs | asked, *args, **kwargs)

    def _next_token_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        layer = head(self.model)
        hidden = outputs.hidden_states[-1][:, -labels.shape[1] :]  # a prompt's virtual tokens stand in front
        total, tokens = chunked_next_token_nll(
            hidden, layer.weight, labels, bias=layer.bias, softcap=layer.softcap, logit_scale=layer.logit_scale
        )
        return total / (tokens if num_items_in_batch is None else num_items_in_batch)
