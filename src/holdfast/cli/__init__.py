"""The command line: one module a command, and no logic that the library does not have."""

from __future__ import annotations

import errno
import shlex
import sys
from typing import Annotated

import typer

from holdfast.cli import (
    check,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    gate,
    lab,
    learn,
    listing,
    rebuild,
    replay,
    report,
    rollback,
    run,
    serve,
    status,
    sweep,
    watch,
)
from holdfast.system.terminal import say, show_printable_errors
from holdfast.system.url import hide_logins
from holdfast.version import __version__

app = typer.Typer(
    name="holdfast",
    help="Teach a language model one task after another without it forgetting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"holdfast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of holdfast itself, before any command."""


app.command("demo")(demo.demo)
app.command("learn", cls=learn.HelpWithKeys)(learn.learn)
app.command("run", cls=run.HelpWithKeys)(run.run)
app.command("sweep", cls=sweep.HelpWithSweepKeys)(sweep.sweep)
app.command("check")(check.check)
app.command("evaluate")(evaluate.evaluate)
app.command("serve")(serve.serve)
app.command("status")(status.status)
app.command("watch")(watch.watch)
app.command("rollback")(rollback.rollback)
app.command("rebuild")(rebuild.rebuild)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("methods")(listing.methods)
app.command("tuners")(listing.tuners)
app.command("streams")(listing.streams)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("doctor")(doctor.doctor)
app.command("gate")(gate.gate)
app.command("replay")(replay.replay)
app.add_typer(lab.app, name="lab")


OF_PATHS = (
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP),
)
"""Errors that a path has which a user named."""


def main() -> None:
    """Exit codes: 0 done; 2 the user's configuration or data is wrong; 3 a gate failed; 1 anything else."""
    from holdfast.errors import GateFailed, Interrupted, MethodError, ProcessFailed, UserError

    show_printable_errors()
    if sys.argv[1:2] and sys.argv[1].startswith("--local_rank="):
        del sys.argv[1]  # DeepSpeed's launcher puts it there, and into LOCAL_RANK
    try:
        _refuse_empty(sys.argv[1:])
        app()
    except (UserError, GateFailed, ProcessFailed) as error:
        if not _tell_launcher(error):
            say(f"holdfast: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except MethodError as error:
        if not _tell_launcher(error):
            say(f"holdfast: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stopped:
        if not _tell_launcher(stopped):
            command = hide_logins(shlex.join(["holdfast", *sys.argv[1:]]))
            say(f"holdfast: {stopped}. Continue with: {command}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_PATHS and error.filename is not None:
            say(f"holdfast: {str(error.filename)!r:.100}: {error.strerror}", file=sys.stderr)
            sys.exit(UserError.exit_code)
        if not _tell_launcher(error):
            raise
        sys.exit(1)


def _refuse_empty(arguments: list[str]) -> None:
    """An empty path would be the current folder, and other empty arguments mean nothing."""
    from holdfast.errors import ConfigError

    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            empty = argument.strip() or (f"the argument after {before}" if before else "the first argument")
            raise ConfigError(f"{empty}: is empty; is a variable of the shell not set?")


def _tell_launcher(error: Exception) -> bool:
    from holdfast.system.launch import tell_launcher

    return tell_launcher(error)
