"""What follows from the gate's checks of a stage; nothing here reads or writes a file."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.records.gate import Action, Check, Decision, failed, record
from holdfast.runner.plan import PlannedStage


def standing(decisions: Sequence[Decision], stage: PlannedStage) -> list[Decision]:
    """The decisions of a run that stand when a stage is judged.

    A stop after this very stage is taken back, since the limits may be others by now.
    """
    last = decisions[-1] if decisions else None
    taken_back = last is not None and last["stage"] == stage.index and last["action"] == "stop"
    return list(decisions[:-1] if taken_back else decisions)


def must_judge(decisions: Sequence[Decision], stage: PlannedStage) -> bool:
    """Whether a stage is to be judged: every stage, once, but not the model before training."""
    return stage.index > 0 and stage.index not in [decision["stage"] for decision in decisions]


def strictest(actions: Sequence[Action]) -> Action:
    """What a run does where several limits are exceeded, each with an action of its own; continue where there is
    none."""
    return next((action for action in ("stop", "rollback") if action in actions), "continue")


def decide(
    decisions: Sequence[Decision],
    stage: PlannedStage,
    checks: Sequence[Check],
    on_fail: Action,
    scores: Sequence[float | None],
    learned: Sequence[int],
) -> Decision:
    """Decide what a run does after a stage.

    A stage that passed is kept. After one that failed the run stops, goes back to the last stage that did not fail (or
    to the start), or goes on.

    Args:
        decisions: those on earlier stages.
        checks: of the stage.
        on_fail: what the configuration wants.
        scores: the stage's row of the score matrix.
        learned: the stages that made the weights that the stage began with.
    """
    passed = not failed(checks)
    action: Action = "continue" if passed else on_fail
    current = stage.index
    if action == "rollback":
        rejected = {decision["stage"] for decision in decisions if not decision["passed"]}
        current = max(t for t in (0, *learned) if t not in rejected)
    return {
        "stage": stage.index,
        "task": stage.name,
        "passed": passed,
        "action": action,
        "current": current,
        "checks": record(checks),
        "scores": list(scores),
    }
