"""What the score matrix says: figures, intervals and comparisons, as pure functions on numbers."""

from holdfast.metrics.intervals import intervals, paired_difference, task_intervals
from holdfast.metrics.matrix import BY_TASK, FIGURES, LOWER_IS_BETTER, NO_ACCURACY
from holdfast.metrics.seeds import holm, mean_interval, seed_difference, seed_intervals
from holdfast.metrics.summary import (
    area_under_curve,
    by_task,
    clipped_backward_transfer,
    harmonic_mean,
    summarize,
)

__all__ = [
    "BY_TASK",
    "FIGURES",
    "LOWER_IS_BETTER",
    "NO_ACCURACY",
    "area_under_curve",
    "by_task",
    "clipped_backward_transfer",
    "harmonic_mean",
    "holm",
    "intervals",
    "mean_interval",
    "paired_difference",
    "seed_difference",
    "seed_intervals",
    "summarize",
    "task_intervals",
]
