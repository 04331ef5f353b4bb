"""What the score matrix says: figures, intervals and comparisons, as pure functions on numbers."""

from holdfast.metrics.intervals import (
    intervals,
    mean_interval,
    paired_difference,
    seed_intervals,
    task_intervals,
)
from holdfast.metrics.matrix import BY_TASK, FIGURES, LOWER_IS_BETTER, NO_ACCURACY
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
    "intervals",
    "mean_interval",
    "paired_difference",
    "seed_intervals",
    "summarize",
    "task_intervals",
]
