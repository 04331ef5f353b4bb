"""Plain lines of progress, where there is no terminal: what they say, and how much time they say is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from holdfast.system import progress
from holdfast.system.progress import Later, Progress


@pytest.mark.parametrize(("before", "batch"), [(0, 1), (0, 32), (320, 32)])
def test_the_time_left_is_right_at_once(monkeypatch: pytest.MonkeyPatch, before: int, batch: int) -> None:
    """Batches of 4 seconds each, of work of which an earlier start did a part."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    output = io.StringIO()
    shown = Progress(Console(file=output, width=80))
    total = before + 30 * batch
    with shown.bar("red") as bar:
        for number in range(1, 31):
            clock[0] += 4
            bar.update(before + number * batch, total=total)
    said = [line.split("  ") for line in output.getvalue().splitlines()]
    assert said[-1] == ["red", f"{total}/{total}", "done"]
    told = 0
    for _, steps, *left in said[:-1]:
        batches_left = (total - int(steps.partition("/")[0])) // batch
        assert left == [f"{4 * batches_left // 60}:{4 * batches_left % 60:02d} left"]
        told += bool(left)
    assert told >= 5


def test_the_time_left_of_the_run_is_right_from_the_first_line_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 4 seconds; 20 more of them and 30 seconds of evaluations follow."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    output = io.StringIO()
    with Progress(Console(file=output, width=120)).bar("red") as bar:
        for step in range(1, 21):
            clock[0] += 4
            bar.update(step, "loss 1.0", total=20, later=Later(20, 30.0))
    said = [line.split("  ") for line in output.getvalue().splitlines()]
    assert len(said) > 1 and said[-1] == ["red", "20/20", "loss 1.0", "done", "run 1:50 left"]
    for _, steps, _, left, whole in said[:-1]:
        seconds = 4 * (20 - int(steps.partition("/")[0]))
        assert left == f"{seconds // 60}:{seconds % 60:02d} left"
        seconds += 4 * 20 + 30
        assert whole == f"run {seconds // 60}:{seconds % 60:02d} left"


def test_work_within_a_piece_of_work_is_shown_in_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    output = io.StringIO()
    with Progress(Console(file=output, width=120)).bar("red") as bar, bar.part("samples") as show:
        for step in range(1, 61):
            clock[0] += 1
            show(step, 60)
    said = output.getvalue().splitlines()
    assert len(said) == 6 and said[0] == "red: samples  10/60  0:50 left" and said[-1] == "red: samples  60/60  done"


def test_work_within_a_piece_of_work_has_a_bar_of_its_own_in_a_terminal() -> None:
    shown = Progress(Console(file=io.StringIO(), force_terminal=True, width=80))
    with shown.bar("red") as bar:
        assert bar._bars is not None
        with bar.part("samples") as show:
            show(1, 2)
            assert [(task.description, task.completed, task.total) for task in bar._bars.tasks] == [
                ("red", 0, None),
                ("red: samples", 1, 2),
            ]
        assert [task.description for task in bar._bars.tasks] == ["red"]
