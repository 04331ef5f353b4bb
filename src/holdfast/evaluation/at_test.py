"""Test time: a model, and the methods that act on test rows before it answers them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.api.rows import IGNORED

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from holdfast.api.method import Method
    from holdfast.api.rows import TokenRow
    from holdfast.api.task import Example, Task
    from holdfast.data.encode import Encoder
    from holdfast.evaluation.served import EndpointModel
    from holdfast.models.answers import AnswerCache
    from holdfast.models.vllm_engine import Responder
    from holdfast.scoring import Scorer


@dataclass
class ModelEvaluation:
    """A model to be measured, with the methods that act at test time.

    Attributes:
        model: a language model, with or without adapters.
        encoder: turns examples into tokens.
        batch_size: sequences in one forward pass.
        methods: applied in this order.
        seed: of the run; a method's random choices at test time depend on it.
        scorers: of metrics that need more than their name, by name.
        answers: saves the answers of these weights, so that none is asked for twice.
        endpoint: a model behind an endpoint that responds in the place of ``model``.
        responder: an engine with the weights of ``model`` that responds in its place; likelihoods are the model's.
    """

    model: PreTrainedModel | PeftModel
    encoder: Encoder
    batch_size: int
    methods: Sequence[Method] = field(default_factory=list)
    seed: int = 0
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    answers: AnswerCache | None = None
    endpoint: EndpointModel | None = None
    responder: Responder | None = None

    def ask(self, task: Task, example: Example, reserve: int) -> Example:
        """What the model is asked in the place of a test example, with ``reserve`` tokens left for the response."""

        def fits(longer: Example) -> bool:
            return self.encoder.fits(longer, reserve)

        for method in self.methods:
            example = method.ask(self, task, example, fits)
        return example

    def parts(self, rows: Sequence[TokenRow]) -> Generator[list[int]]:
        """The numbers of the rows that are answered together before the generator continues; every row comes once."""
        yield from _parts(self, self.methods, rows)

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
        """Rows padded on the right: ``input_ids``, ``attention_mask``, ``labels``, int64 [rows, seq], on the model's
        device, and what their encoder reads; the tokens of a row without labels are not supervised."""
        from holdfast.data.collate import Collator

        pad: Any = self.encoder.tokenizer.pad_token_id
        batch = Collator(pad)([{"labels": [IGNORED] * len(row["input_ids"])} | dict(row) for row in rows])
        return {key: values.to(self.model.device) for key, values in batch.items() if key != "row"}


def _parts(evaluation: ModelEvaluation, methods: Sequence[Method], rows: Sequence[TokenRow]) -> Iterator[list[int]]:
    """The parts in which the first method answers the rows, each divided further by the methods after it."""
    if not methods:
        yield list(range(len(rows)))
        return
    with closing(methods[0].at_test(evaluation, rows)) as parts:  # type: ignore[type-var]
        for part in parts:
            for below in _parts(evaluation, methods[1:], [rows[i] for i in part]):
                yield [part[i] for i in below]
