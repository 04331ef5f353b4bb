"""How far a stage moves the model on its own prompts: KL(before ‖ after), which predicts forgetting.

Shenfeld, Pari and Agrawal (2025, arXiv 2509.04259) found that what fine-tuning forgets follows from

    E_x E_{y ~ p}[ log p(y | x) - log q(y | x) ]

with p the model before the stage, q the one after it, and x a prompt of the stage's task. The responses y are drawn
from p before the stage is trained, at temperature 1; then the mean of the difference is an unbiased estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.api.method import Method
from holdfast.api.task import Example
from holdfast.data.encode import Encoder
from holdfast.errors import DataError
from holdfast.metrics.intervals import paired_difference
from holdfast.models.likelihood import token_losses
from holdfast.models.sampling import sample
from holdfast.models.seq2seq import answered_row, start_of
from holdfast.records.shift import Shift
from holdfast.runner.plan import PlannedStage
from holdfast.runner.setup import Setup
from holdfast.system.progress import Progress

LENGTH = 32
"""Tokens of a response at most."""
RESAMPLES = 1000
"""Of the interval's bootstrap."""


@dataclass(frozen=True)
class Drawn:
    """Responses of the model before a stage.

    Attributes:
        rows: prompts and responses, which are supervised.
        nats: the negative log-likelihood of each response under that model.
    """

    rows: list[dict[str, Any]]
    nats: list[float]


def draw(setup: Setup, stage: PlannedStage, model: Any, progress: Progress) -> Drawn | None:
    """Let the model answer prompts of a stage's test rows, before it is trained.

    Returns:
        None where the stage has no prompts, its test rows are texts, or a method acts on the model at test time.
    """
    most = setup.config.evaluation.shift
    asked = [example for task in stage.tasks for example in task.test if example.text is None]
    if not most or not asked or any(type(method).at_test is not Method.at_test for method in setup.applied):
        return None
    chosen = asked[:: -(-len(asked) // most)]
    length = min(LENGTH, setup.max_length // 2)
    prompts, rooms = zip(*(_prompt(setup.encoder, example, length) for example in chosen), strict=True)
    tokenizer, size = setup.encoder.tokenizer, setup.config.evaluation.batch_size
    seed = f"{setup.config.seed}/{stage.index}/shift"
    rows, nats = [], []
    with progress.bar(f"stage {stage.index} ({stage.name}): answers before it, to tell how far it moves") as bar:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            samples = sample(
                model,
                part,
                max_new_tokens=rooms[start : start + size],
                seed=seed,
                numbers=range(start, start + len(part)),
                stop_token_ids=setup.encoder.stop_ids,
                pad_token_id=tokenizer.pad_token_id,
            )
            for prompt, tokens in zip(part, samples.tokens, strict=True):
                rows.append(answered_row(prompt, tokens, start_of(model)))
            nats += [-log_prob for log_prob in samples.log_probs]
            bar.update(len(rows), total=len(prompts))
    return Drawn(rows, nats)


def _prompt(encoder: Encoder, example: Example, length: int) -> tuple[list[int], int]:
    """The tokens of a prompt, and those of its response at most: so many, or what is left of the longest sequence where
    the prompt cannot be cut for them, as one that is measured by short answers."""
    try:
        return encoder.prompt(example, reserve=length), length
    except DataError:
        prompt = encoder.prompt(example, reserve=1)
        return prompt, max(1, encoder.max_length - len(prompt))


def measure(setup: Setup, drawn: Drawn, model: Any) -> Shift:
    """Compare the model after a stage with the one that answered."""
    after, tokens = token_losses(
        model,
        drawn.rows,
        batch_size=setup.config.evaluation.batch_size,
        pad_token_id=setup.encoder.tokenizer.pad_token_id,
    )
    before = np.array(drawn.nats)
    sides = [np.stack([nats, tokens], axis=1) for nats in (before, after)]
    totals = [lambda sums: sums[..., 0] / sums[..., 1]]
    found = paired_difference([sides[0]], [sides[1]], totals=totals, resamples=RESAMPLES, permutations=1)
    return {
        "nats": float((after - before).sum() / tokens.sum()),
        "interval": found["interval"],
        "responses": len(drawn.rows),
        "tokens": int(tokens.sum()),
    }
