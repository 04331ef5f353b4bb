"""The figures of a comparison: what each means, and which direction is good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["high", "low"]


@dataclass(frozen=True)
class Figure:
    """One figure: its key in matrix.json or run.json, what it is, and which direction is good.

    ``signed``: it is a change, so it is written with its sign.
    """

    key: str
    label: str
    definition: str
    formula: str
    better: Direction
    signed: bool = False


FIGURES = (
    Figure(
        "average",
        "average",
        "Mean score of all tasks after the last stage.",
        "mean over j of S[T][j]",
        "high",
    ),
    Figure(
        "new_task",
        "new task",
        "Mean score of each task right after its own stage: how well new tasks are learned.",
        "mean over j of S[j][j]",
        "high",
    ),
    Figure(
        "learned",
        "learned",
        "What each stage gained on its own task. Where that is not above its interval, forgetting says nothing.",
        "mean over j of (S[j][j] − S[j−1][j])",
        "high",
        signed=True,
    ),
    Figure(
        "forgetting",
        "forgetting",
        "How far each earlier task fell from its best to the end. Positive is worse.",
        "mean over j < T of (best S[t][j] for j ≤ t < T, less S[T][j])",
        "low",
    ),
    Figure(
        "backward_transfer",
        "backward transfer",
        "What later stages did to each earlier task since its own stage. Negative is worse.",
        "mean over j < T of (S[T][j] − S[j][j])",
        "high",
        signed=True,
    ),
    Figure(
        "forward_transfer",
        "forward transfer",
        "What earlier stages gave each task before its own stage, against no training. Positive is better.",
        "mean over j > 1 of (S[j−1][j] − S[0][j])",
        "high",
        signed=True,
    ),
    Figure(
        "general_change",
        "general change",
        "Change of general ability (its accuracy-like measures) from before training to the end. Negative is worse.",
        "mean over measures of (after the last stage − before training)",
        "high",
        signed=True,
    ),
    Figure(
        "harmonic_mean",
        "harmonic mean",
        "General ability and average in one number, low where either is (GeRe's F1 Avg).",
        "2ab / (a + b), where a is the mean of the accuracy-like measures after the last stage and b the average",
        "high",
    ),
)
CLIPPED = Figure(
    "clipped_backward_transfer",
    "clipped transfer",
    "Backward transfer in which one task's gain does not make up for another's loss. 0 is best.",
    "mean over j < T of min(S[T][j] − S[j][j], 0)",
    "high",
    signed=True,
)
COMPARED = (*FIGURES[:5], CLIPPED, *FIGURES[5:])
"""Those of a comparison."""
COSTS = (
    Figure("minutes", "minutes", "Time to train and evaluate.", "", "low"),
    Figure("tokens", "tokens", "Tokens that went through training, rehearsal included, padding not.", "", "low"),
    Figure("peak_memory_gib", "memory, GiB", "Most memory in use at once while training.", "", "low"),
)


SHIFT = Figure(
    "shift",
    "shift, nats a token",
    "How far a stage moves the model on its own prompts: KL of the model before it to the one after it, mean over the "
    "stages.",
    "",
    "low",
)


def direction(figure: Figure, lower: bool) -> Direction:
    """Which direction is good, where ``lower`` says whether that is so of the tasks' scores: a mean loss is good when
    low. Differences are turned round for losses, so that their sign keeps its meaning."""
    return "low" if figure.key in ("average", "new_task") and lower else figure.better
