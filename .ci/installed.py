"""Whether an installed holdfast is whole: every file of the source, and every command answers.

Run with the environment's own Python and the folder of the source as argument.
"""

import re
import subprocess
import sys
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path

import typer

from holdfast import __version__
from holdfast.cli import app

BINARY = Path(sys.executable).with_name("holdfast")


def answer(*words: str) -> str:
    done = subprocess.run([BINARY, *words], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        sys.exit(f"holdfast {' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def commands(group, *path: str):
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)


def main(source: Path) -> None:
    installed = Path(str(files("holdfast")))
    if installed.is_relative_to(source):
        sys.exit(f"{installed} is the source itself")
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    if missing := [path for path in wanted if not (installed / path).is_file()]:
        sys.exit(f"not in the wheel: {', '.join(sorted(map(str, missing)))}")
    if relative := re.findall(r"\]\((?!https://)[^)\s]+\)", str(metadata("holdfast").get_payload())):
        sys.exit(f"a package index would show dead links: {', '.join(relative)}")
    if answer("--version") != f"holdfast {__version__}\n":
        sys.exit(f"holdfast --version says {answer('--version')!r}")
    asked = [(), *commands(typer.main.get_command(app))]
    for words in asked:
        answer(*words, "--help")
    for listing in ("methods", "tuners", "streams"):
        answer(listing)
    print(f"holdfast {__version__}: {len(wanted)} files, {len(asked)} commands")


main(Path(sys.argv[1]).resolve())
