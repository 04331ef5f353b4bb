"""Why figures of a score matrix are null: which scores they lack, and which of these were never measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from holdfast.metrics.matrix import NO_ACCURACY, Metrics, common_scale

Place = tuple[int, int]
"""A row of the score matrix, and a task, from 0."""

NAMED = 4
"""Scores that a reason names at most."""


def why_missing(
    scores: Sequence[Sequence[float | None]],
    figures: Mapping[str, float | None],
    *,
    tasks: Sequence[str],
    metrics: Metrics,
    general: Mapping[str, Sequence[float | None]],
    joint: bool = False,
    when: str = "all",
) -> dict[str, str]:
    """The reason of each figure that is None.

    Args:
        scores: S, [T+1][T].
        figures: those of the summary and the like, by key.
        tasks: their names.
        metrics: as in :func:`holdfast.metrics.summarize`.
        general: the values of general abilities, T+1 each.
        joint: whether one stage learned all tasks.
        when: ``evaluation.when``, which may leave scores out.
    """
    found = {}
    for figure in (key for key, value in figures.items() if value is None):
        if figure == "general_change":
            found[figure] = _of_general(general)
        elif common_scale(metrics, len(tasks)) is None:
            found[figure] = "the tasks' metrics have no common scale, so their scores have no mean"
        elif joint and figure not in ("average", "harmonic_mean"):
            found[figure] = "one stage learned all tasks"
        elif figure in LATER and len(tasks) == 1:
            found[figure] = "there is one task only"
        else:
            places = NEEDS[figure](len(tasks))
            found[figure] = _of_scores([p for p in places if scores[p[0]][p[1]] is None], scores, tasks, when)
    return found


def _of_general(general: Mapping[str, Sequence[float | None]]) -> str:
    accuracies = [name for name in general if not name.startswith(NO_ACCURACY)]
    if not accuracies:
        return "no accuracy-like general ability is measured"
    lacking = [name for name in accuracies if None in (general[name][0], general[name][-1])]
    return f"no value before training, or at the end, of {', '.join(lacking)}"


def _of_scores(
    places: Sequence[Place], scores: Sequence[Sequence[float | None]], tasks: Sequence[str], when: str
) -> str:
    if not places:
        return "it is not finite, or has no meaning for such scores"
    named = [f"{tasks[j]} {f'after stage {t}' if t else 'before training'}" for t, j in places[:NAMED]]
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    later = dict.fromkeys(tasks[j] for t, j in places if any(row[j] is not None for row in scores[t + 1 :]))
    why = f"{', '.join(later)} came later" if when == "all" else f"evaluation.when: {when} left it out"
    came = f"; {why}, and --backfill measures it" if later else ""
    return f"no score of {', '.join(named)}{more}{came}"


def _last(T: int) -> list[Place]:
    return [(T, j) for j in range(T)]


def _own(T: int) -> list[Place]:
    return [(j + 1, j) for j in range(T)]


NEEDS = {
    "average": _last,
    "harmonic_mean": _last,
    "new_task": _own,
    "learned": lambda T: [(t, j) for j in range(T) for t in (j, j + 1)],
    "forgetting": lambda T: [(t, j) for j in range(T - 1) for t in range(j + 1, T + 1)],
    "backward_transfer": lambda T: [(t, j) for j in range(T - 1) for t in (j + 1, T)],
    "clipped_backward_transfer": lambda T: [(t, j) for j in range(T - 1) for t in (j + 1, T)],
    "forward_transfer": lambda T: [(t, j) for j in range(1, T) for t in (0, j)],
}
"""The scores that each figure needs."""

LATER = ("forgetting", "backward_transfer", "clipped_backward_transfer", "forward_transfer")
"""Figures of more than one task."""
