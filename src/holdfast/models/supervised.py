"""The head on supervised tokens alone: logits only where they predict a token with a label.

A hook on the head's module gathers the hidden states that come to it. The model calls the head as always: engines make
its weights whole, adapters on it act, and scaling and soft-capping follow. Of instructions few tokens are supervised,
and vocabularies are large.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

from holdfast.engines.autocast import is_mixed
from holdfast.engines.pieces import own_class
from holdfast.losses.chunked import CHUNK_SIZE
from holdfast.losses.common import wide
from holdfast.losses.next_token import predicting
from holdfast.models.generation import evaluating
from holdfast.models.head import base, bounded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EXACT, ROUNDED = 1e-4, 0.01  # how far two losses may be apart, as a share: of float32, and of shorter types
NEAR = 0.05  # how far two logits may be apart, as a share

T = TypeVar("T")


class OneRow(NamedTuple):
    """The positions of a batch that predict a supervised token, one after another, as if they were one row.

    Its logits at position i predict its label i + 1, as those of any row do: a loss that shifts logits against labels
    has the value and the gradient of the whole batch.

    Attributes:
        shape: of the batch: rows, seq.
        places: int64 [tokens + 1], positions in the flattened batch, row by row. The last one repeats the first, since
            a row's last position predicts nothing.
        labels: int64 [1, tokens + 1].
    """

    shape: torch.Size
    places: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, rows: int | None = None) -> OneRow:
        """Of a batch's labels, int64 [batch, seq], -100 where not supervised.

        Args:
            rows: so many rows, the first, have a loss: the labels of the others become -100. None: all.
        """
        places = predicting(labels).flatten().nonzero().squeeze(-1)
        targets = labels.flatten()[places + 1]
        if rows is not None:
            targets = targets.masked_fill(places >= rows * labels.shape[1], -100)
        last = places[:1] if len(places) else places.new_zeros(1)
        return cls(labels.shape, torch.cat([places, last]), F.pad(targets, (1, 0), value=-100)[None])


@dataclass
class Gathered:
    """Whether a forward pass applied the head to chosen positions alone; its logits are then [1, positions, vocab]."""

    done: bool = False


@contextmanager
def head_on(
    model: PreTrainedModel | PeftModel, row: OneRow, read: Callable[[Any, Tensor], Tensor] | None = None
) -> Iterator[Gathered]:
    """Within it a forward pass of the batch applies the head to the positions of ``row`` alone.

    It does not where the head gets other hidden states than [rows, seq, hidden], as after a soft prompt.

    Args:
        read: given the head's layer and these hidden states, [tokens + 1, hidden], it says which of them the model goes
            on with.
    """
    gathered = Gathered()
    layer: Any = getattr(base(model), "get_output_embeddings", lambda: None)()

    def gather(layer: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != row.shape:
            return None
        gathered.done = True
        hidden = hidden.flatten(0, 1).index_select(0, row.places.to(hidden.device))
        return (hidden if read is None else read(layer, hidden))[None], *args[1:]

    hook = layer.register_forward_pre_hook(gather) if isinstance(layer, nn.Module) else None
    try:
        yield gathered
    finally:
        if hook is not None:
            hook.remove()


def predictions(model: PreTrainedModel | PeftModel, batch: Any, labels: Tensor, **options: Any) -> Tensor:
    """The logits that predict the supervised tokens of a batch: [tokens, vocab], row by row, in the model's data type.

    Args:
        batch: arguments of the forward pass, without labels.
        labels: int64 [rows, seq]; -100 where not supervised.
        options: further arguments of the forward pass.
    """
    row = OneRow.of(labels)
    with head_on(model, row) as gathered:
        logits = model(**batch, **options).logits
    return logits[0, :-1] if gathered.done else logits[predicting(labels)]


@torch.no_grad()
def by_chunk(
    model: PreTrainedModel | PeftModel,
    batch: Callable[[], dict[str, Any]],
    row: OneRow,
    use: Callable[[Tensor, slice], T],
) -> list[T]:
    """What ``use`` makes of the logits that predict supervised tokens, of which few have logits at a time.

    The head's layer is called within the model's forward pass, a chunk of tokens after the other. The last token goes
    through the model as well, which shows whether the logits are what that layer gives, scaled and soft-capped; where
    they are not, the head is applied to all of these tokens at once.

    Args:
        batch: gives arguments of the forward pass, which may change them, as it does a cache.
        use: takes logits, [chunk, vocab], float32 or wider, and the chunk's slice of the tokens.
    """
    chunks = [slice(start, start + CHUNK_SIZE) for start in range(0, len(row.places) - 1, CHUNK_SIZE)]
    found: list[T] = []
    last: list[Tensor] = []

    def read(layer: Any, hidden: Tensor) -> Tensor:
        found.extend(use(bounded(model, layer.forward(hidden[:-1][chunk])), chunk) for chunk in chunks)
        last.append(bounded(model, layer.forward(hidden[-1:])))
        return hidden[-1:]

    with head_on(model, row, read) as gathered:
        logits = model(**batch()).logits
    if not gathered.done:
        logits = logits.flatten(0, 1)[row.places]
    elif last[0].shape == logits[0].shape and (last[0] - logits[0]).norm() <= NEAR * logits[0].float().norm():
        return found
    else:
        with head_on(model, row):
            logits = model(**batch()).logits[0]
    return [use(wide(logits[:-1][chunk]), chunk) for chunk in chunks]


@torch.no_grad()
def keeps_its_loss(model: Any) -> bool:
    """Whether a model's own loss is the same where its head is applied to supervised tokens alone.

    It is for causal language models of transformers, unless a tuner reads the labels. That is tried on a few tokens;
    all processes of a divided model call this together.
    """
    inner: Any = base(model)
    own: Any = own_class(inner)
    known = own.__name__ in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *SEEING.values())
    if not known or not own.forward.__module__.startswith("transformers.models.") or _reads_labels(model):
        return False
    config = inner.config.get_text_config()
    if config.is_encoder_decoder:
        return False
    ids = (torch.arange(16, device=inner.device) % config.vocab_size).view(2, 8)
    labels = ids.clone()
    labels[0, :4] = labels[1, :2] = labels[1, 6:] = -100
    row = OneRow.of(labels)
    options = {"use_cache": False} if "use_cache" in inspect.signature(own.forward).parameters else {}
    with evaluating(model):
        whole = model(input_ids=ids, labels=labels, **options)
        try:
            with head_on(model, row) as gathered:
                loss = model(input_ids=ids, labels=row.labels, **options).loss
        except (RuntimeError, ValueError, IndexError):  # its loss wants a label for each token of the input
            return False
    exact = whole.logits.dtype in (torch.float32, torch.float64) and not is_mixed(model)
    tolerance = EXACT if exact else ROUNDED
    return gathered.done and abs(float(loss) - float(whole.loss)) <= tolerance * abs(float(whole.loss))


def _reads_labels(model: Any) -> bool:
    """Whether a tuner reads the labels of a forward pass, or puts soft prompts before the input."""
    prompts = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    return prompts or getattr(getattr(model, "base_model", None), "reads_labels", False)
