"""Train rows of any dataset as a method sees them: input ids and labels, as the trainer's own collator makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from holdfast.api.rows import TokenRow
from holdfast.errors import ConfigError


class CollatedRows(Sequence[TokenRow]):
    """Rows of a dataset, each put through the trainer's collator by itself, so that labels are what the loss sees.

    Args:
        dataset: with ``__len__`` and ``__getitem__``; ConfigError at the first use where it has none.
        collate: what turns a list of its rows into a batch.
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
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
            kept = batch["attention_mask"][0].bool()
            ids, labels = ids[kept], labels[kept]
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}
