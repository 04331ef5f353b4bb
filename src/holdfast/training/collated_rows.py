"""Train rows of any dataset as methods see them: the token ids and labels that the trainer's own collator makes.

Of preferences these are the prompts with the answers that are called good, as rows of the next-token loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from holdfast.api.rows import TokenRow, token_rows
from holdfast.errors import ConfigError
from holdfast.training.batches import good_answers, is_preference_batch, is_token_batch, media, tokens_alone


class CollatedRows(Sequence[TokenRow]):
    """Rows of a dataset, each collated alone by the trainer's collator, so that labels are those of the loss.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        collate: makes a batch of a list of its rows.

    Raises:
        ConfigError: when it is first used: the dataset has no length, or the collator makes no token batches. When a
            row is read: it has pictures or sounds, which its tokens do not hold.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]):
        self._dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def _places(self) -> Sequence[int]:
        """The rows of the dataset that have a good answer: all, unless their column ``label`` says which."""
        try:
            count = len(self._dataset)
        except TypeError:
            raise ConfigError(
                "train_dataset: has no length, so that no sample can be chosen from it; a method that stores rows of "
                "a task needs a map-style dataset"
            ) from None
        if not count or not is_preference_batch(first := self._collate([self._dataset[0]])) or "label" not in first:
            return range(count)
        column = getattr(self._dataset, "column_names", None)
        labels = self._dataset["label"] if column else [self._dataset[i]["label"] for i in range(count)]
        good = [place for place, label in enumerate(labels) if label]
        if not good:
            raise ConfigError(
                "train_dataset: no row has label true, so there is no good answer that a method could store or measure"
            )
        return good

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch = self._collate([self._dataset[self._places[index]]])
        if column := media(batch):
            raise ConfigError(f"train_dataset: {tokens_alone(column)}")
        batch = good_answers(batch)
        if not is_token_batch(batch):
            raise ConfigError(
                "train_dataset: the trainer's collator does not make input_ids and a label for each of them; a method "
                "that stores or measures rows of a task needs answers to learn from, as Trainer and TRL's SFTTrainer, "
                "DPOTrainer and KTOTrainer have them"
            )
        [row] = token_rows(batch)
        if "encoder_ids" in batch:
            return {**row, "encoder_ids": batch["encoder_ids"][0][batch["encoder_mask"][0].bool()].tolist()}
        return row
