"""Train rows of any dataset as methods see them: the token ids and labels that the trainer's own collator makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.api.rows import TokenRow
from holdfast.errors import ConfigError
from holdfast.training.batches import is_token_batch


class CollatedRows(Sequence[TokenRow]):
    """Rows of a dataset, each collated alone by the trainer's collator, so that labels are those of the loss.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        collate: makes a batch of a list of its rows.

    Raises:
        ConfigError: when it is first used: the dataset has no length, or the collator makes no token batches.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]):
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        try:
            return len(self._dataset)
        except TypeError:
            raise ConfigError(
                "train_dataset: has no length, so that no sample can be chosen from it; a method that stores rows of "
                "a task needs a map-style dataset"
            ) from None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch = self._collate([self._dataset[index]])
        if not is_token_batch(batch):
            raise ConfigError(
                "train_dataset: the trainer's collator does not make input_ids and a label for each of them; a method "
                "that stores or measures rows of a task needs a trainer of the next-token loss, such as Trainer or "
                "TRL's SFTTrainer"
            )
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
            real = batch["attention_mask"][0].bool()
            ids, labels = ids[real], labels[real]
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}
