"""`holdfast gate`: check a run against limits on what may be forgotten; exit code 3 if it failed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.collection import no_collection
from holdfast.system.terminal import say

RunPath = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False, metavar="RUN")]
Forgetting = Annotated[str | None, typer.Option(help="Forgetting, of the tasks learned so far.")]
TaskForgetting = Annotated[str | None, typer.Option(help="Forgetting of any single task.")]
LossIncrease = Annotated[
    str | None, typer.Option(help="Rise of each loss on general text: nats a token, or a share such as 2%.")
]
GeneralDrop = Annotated[str | None, typer.Option(help="Fall of each accuracy-like general ability.")]
Average = Annotated[str | None, typer.Option(help="Average over the tasks learned so far.")]
NewTask = Annotated[str | None, typer.Option(help="Score of the stage's own task.")]
Learned = Annotated[str | None, typer.Option(help="Rise of the stage's own task's score in that stage.")]
Stage = Annotated[int | None, typer.Option(help="After which stage, from 1; the last one if absent.")]
Junit = Annotated[Path | None, typer.Option(help="Write JUnit XML here.")]
Comment = Annotated[Path | None, typer.Option(help="Write the Markdown of a pull request's comment here.")]
PageAddress = Annotated[str | None, typer.Option("--page", help="Address of the run's page, for --comment.")]
Markdown = Annotated[Path | None, typer.Option(help="Write a summary in Markdown here.")]


def gate(
    run: RunPath,
    max_forgetting: Forgetting = None,
    max_task_forgetting: TaskForgetting = None,
    max_general_loss_increase: LossIncrease = None,
    max_general_drop: GeneralDrop = None,
    min_average: Average = None,
    min_new_task: NewTask = None,
    min_learned: Learned = None,
    stage: Stage = None,
    junit: Junit = None,
    markdown: Markdown = None,
    comment: Comment = None,
    page: PageAddress = None,
) -> None:
    """Check a run against the limits given here; without any, against those of its configuration.

    Exit code 3: a limit was exceeded, or a score that it needs was not measured.
    """
    with no_collection():
        from holdfast.errors import ConfigError
        from holdfast.records.gate import failed, judge_directory
        from holdfast.report.comment import as_comment
        from holdfast.report.verdict import as_junit, as_markdown, as_text
        from holdfast.system.output import write_output

    limits = {
        "max_forgetting": max_forgetting,
        "max_task_forgetting": max_task_forgetting,
        "max_general_loss_increase": max_general_loss_increase,
        "max_general_drop": max_general_drop,
        "min_average": min_average,
        "min_new_task": min_new_task,
        "min_learned": min_learned,
    }
    if page is not None and (comment is None or not re.fullmatch(r"https?://[^\s<>()\[\]\\`]+", page)):
        raise ConfigError(
            "--page: must be an address that begins with https://, without blanks and brackets, and needs --comment"
        )
    files = [file for file in (junit, markdown, comment) if file is not None and not file.is_char_device()]
    if len(set(files)) < len(files):
        raise ConfigError("--junit, --markdown, --comment: need a file each")
    judged = judge_directory(run, {key: value for key, value in limits.items() if value is not None}, stage)
    title, checks = judged.title, judged.checks
    if comment is not None:
        write_output(comment, as_comment(judged, page))
    if markdown is not None:
        write_output(markdown, as_markdown(checks, title))
    if junit is not None:
        write_output(junit, as_junit(checks, title))
    say(f"{title}: gate {'failed' if failed(checks) else 'passed'}")
    say(as_text(checks) if checks else "  there is nothing to check yet")
    number = judged.run.stage_of(judged.row) if judged.run.joint else judged.row
    if number not in judged.run.folders:
        lost = "no weights are left to export or serve, and without its answers any rise counts as learned"
        say(f"warning: the folder of the stage is gone from {run / 'stages'}: {lost}", file=sys.stderr)
    if failed(checks):
        raise typer.Exit(3)
