"""What a run does after a stage, decided from checks alone."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.records.gate import Check, Decision
from holdfast.runner.decisions import decide, must_judge, standing
from holdfast.runner.plan import START, PlannedStage

STAGES = [PlannedStage(t, f"task{t}", (), t) for t in range(1, 6)]
GOOD = Check("max_forgetting", "forgetting", 0.0, 0.1)
BAD = Check("max_forgetting", "forgetting", 0.5, 0.1)
UNKNOWN = Check("max_forgetting", "forgetting", None, 0.1)


def history(passed: list[bool], on_fail: Any) -> list[Decision]:
    """The decisions on as many stages."""
    decisions: list[Decision] = []
    for stage, good in zip(STAGES, passed, strict=False):
        learned = [t for t in range(1, stage.index) if on_fail != "rollback" or decisions[t - 1]["passed"]]
        decisions.append(decide(decisions, stage, [GOOD if good else BAD], on_fail, [0.5], learned))
    return decisions


@pytest.mark.parametrize("on_fail", ["stop", "rollback", "continue"])
def test_a_stage_that_passed_is_kept_whatever_would_have_followed(on_fail):
    decision = decide([], STAGES[0], [GOOD, GOOD], on_fail, [0.5, None], [])
    assert (decision["passed"], decision["action"], decision["current"]) == (True, "continue", 1)
    assert (decision["stage"], decision["task"], decision["scores"]) == (1, "task1", [0.5, None])


@pytest.mark.parametrize("checks", [[GOOD, BAD], [UNKNOWN]])
def test_one_check_that_did_not_pass_is_enough(checks):
    decision = decide([], STAGES[0], checks, "continue", [0.5], [])
    assert not decision["passed"] and decision["action"] == "continue" and decision["current"] == 1
    assert [check["passed"] for check in decision["checks"]] == [check.passed for check in checks]


@pytest.mark.parametrize(
    ("passed", "current"),
    [
        ([False], [0]),  # to the start
        ([True, False], [1, 1]),
        ([True, False, False], [1, 1, 1]),  # over the stage that was rejected already
        ([False, False, True, False], [0, 0, 3, 3]),
        ([True, True, False, True, False], [1, 2, 2, 4, 4]),
    ],
)
def test_a_rollback_goes_to_the_last_stage_that_did_not_fail(passed, current):
    decisions = history(passed, "rollback")
    assert [decision["current"] for decision in decisions] == current
    assert [decision["action"] for decision in decisions] == ["continue" if good else "rollback" for good in passed]


def test_a_stage_is_judged_once_and_the_start_never():
    decisions = history([True, False], "continue")
    assert [must_judge(decisions, stage) for stage in [START, *STAGES[:3]]] == [False, False, False, True]
    assert standing(decisions, STAGES[1]) == decisions


def test_a_stop_is_taken_back_when_its_own_stage_is_judged_again():
    decisions = history([True, False], "stop")
    assert standing(decisions, STAGES[1]) == decisions[:1] and must_judge(decisions[:1], STAGES[1])
    assert standing(decisions, STAGES[2]) == decisions
    assert standing([], STAGES[0]) == []
    again = decide(standing(decisions, STAGES[1]), STAGES[1], [BAD], "rollback", [0.5], [1])
    assert (again["action"], again["current"]) == ("rollback", 1)
