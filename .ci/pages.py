"""Lay out the site of the documentation: pages, navigation, reference; `make docs` then builds it.

`python .ci/pages.py FOLDER` writes FOLDER/pages and FOLDER/zensical.yml. Pages stay as GitHub shows them; on the site,
relative links that leave docs/ lead to the page that is made of that file, or else to the repository.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODE = r"^```.*?^```$|^ {4}[^\n]*|`+[^`]*`+"
LINK = re.compile(rf"{CODE}|(?P<before>(?:(?P<image>!)\[[^\]]*)?\]\()(?P<to>[^)\s]+)(?=\))", re.S | re.M)
STAR = re.compile(rf"{CODE}|(?<=θ)(?P<star>\*)", re.S | re.M)
"""The star of θ*, which Python-Markdown would take for emphasis, and GitHub does not."""
OUTSIDE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "results.md",
    "examples/README.md": "examples.md",
}
"""Files outside docs/ that are pages, beside the READMEs of the experiments."""


def sources(root: Path) -> dict[str, str]:
    """Every file of the repository that is on the site, and its path there."""
    found = {file: page for file, page in OUTSIDE.items() if (root / file).is_file()}
    for path in sorted((root / "docs").rglob("*")):
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.relative_to(root / "docs").as_posix()
    for path in sorted((root / "experiments").rglob("README.md")):
        found[path.relative_to(root).as_posix()] = f"{path.parent.relative_to(root).as_posix()}.md"
    for path in sorted((root / "experiments").rglob("*.png")):
        found[path.relative_to(root).as_posix()] = path.relative_to(root).as_posix()
    return {file: re.sub(r"(^|/)README\.md$", r"\1index.md", page) for file, page in found.items()}


def on_site(text: str, file: str, pages: dict[str, str], repository: str) -> str:
    """A page's text with links that work on the site.

    Args:
        file: where it lies in the repository; its links are relative to that.
        pages: what `sources` says.
        repository: address of the repository at a commit, to be followed by a path.
    """

    def replaced(match: re.Match[str]) -> str:
        link = match["to"]
        if link is None or re.match(r"[a-z]+:|#", link):
            return match[0]
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        if target in pages:
            address = posixpath.relpath(pages[target], posixpath.dirname(pages[file]) or ".")
        elif (ROOT / target).exists() and not match["image"]:
            address = f"{repository}/{target}"
        else:
            sys.exit(f"{file}: {link}: there is no {target}" + (" on the site" if match["image"] else ""))
        return f"{match['before']}{address}{'#' if anchor else ''}{anchor}"

    return STAR.sub(lambda match: "\\*" if match["star"] else match[0], LINK.sub(replaced, text))


def navigation(entries: list[Any], pages: set[str]) -> tuple[list[Any], set[str]]:
    """The navigation with every pattern (`methods/*.md`) replaced by the pages that no other entry names.

    Returns:
        It, and the pages that it does not have. A page that is named but not there ends the program.
    """

    def named(entry: Any) -> Iterator[str]:
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]:
            yield from named(part) if isinstance(part, dict | list) else [part]

    names = [name for name in named(entries) if "*" not in name and "://" not in name]
    if missing := sorted(set(names) - pages):
        sys.exit(f"zensical.toml: nav: {', '.join(missing)}: no such page")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        sys.exit(f"zensical.toml: nav: {', '.join(twice)}: named twice")
    rest = sorted(pages - set(names))

    def expanded(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            below = {
                t: [e for part in to for e in expanded(part)] if isinstance(to, list) else to for t, to in entry.items()
            }
            return [below] if all(below.values()) else []
        matching = [page for page in rest if fnmatch(page, entry)] if "*" in entry else [entry]
        for page in matching:
            if "*" in entry:
                rest.remove(page)
        return matching

    return [e for entry in entries for e in expanded(entry)], set(rest)


def commands() -> str:
    """The page of all commands, from their own help."""
    import typer

    from holdfast.cli import app

    def of(group: Any, *path: str) -> Iterator[str]:
        for name, command in group.commands.items():
            words = (*path, name)
            if hasattr(command, "commands"):
                yield from of(command, *words)
                continue
            context = typer.Context(command, info_name=" ".join(words))
            usage = " ".join(["holdfast", *words, *command.collect_usage_pieces(context)])
            yield f"## holdfast {' '.join(words)}\n\n{paragraphs(command.help or '')}\n\n    {usage}\n"
            rows = [row for p in command.get_params(context) if (row := p.get_help_record(context))]
            if rows:
                yield table(("argument or option", "what it is"), [(f"`{a}`", b) for a, b in rows])

    head = "# Commands\n\nWhat `holdfast COMMAND --help` says of every command.\n"
    return "\n".join([head, *of(typer.main.get_command(app))])


def paragraphs(text: str) -> str:
    """A help text as Markdown: what stands between < and > is no HTML."""
    return re.sub(r"<(?=\w)", "\\<", text.replace("\b", "").strip())


def configuration() -> str:
    """The page of all keys of a configuration, by section."""
    from holdfast.config.describe import describe
    from holdfast.config.run import RunConfig

    sections: dict[str, list[tuple[str, ...]]] = {}
    for key, default, text in describe(RunConfig):
        section = key.partition(".")[0] if "." in key else "the run"
        sections.setdefault(section, []).append((f"`{key}`", f"`{default}`" if default else "", text))
    parts = [f"## {name}\n\n{table(('key', 'default', 'what it is'), rows)}" for name, rows in sections.items()]
    head = "# Configuration\n\nEvery key of a run's configuration, as `holdfast run --help` lists them.\n"
    return "\n".join([head, *parts])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""

    def cell(text: str) -> str:
        return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;" if "`" not in text else "<")

    lines = [head, ("---",) * len(head), *([cell(c) for c in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def python() -> dict[str, str]:
    """The pages of the Python names: what mkdocstrings replaces by their docstrings."""
    import holdfast
    from holdfast import api

    def of(title: str, module: Any, about: str) -> str:
        names = [f"::: {module._HOME[name]}.{name}" for name in module.__all__ if name in module._HOME]
        return "\n\n".join([f"# {title}", about, *names]) + "\n"

    return {
        "reference/python.md": of("holdfast in Python", holdfast, "What `from holdfast import ...` gives."),
        "reference/api.md": of(
            "holdfast.api",
            api,
            "All that methods, tuners and scorers of one's own need: `from holdfast.api import ...`.",
        ),
    }


def lay_out(folder: Path) -> None:
    """Write the pages and the tool's configuration into the folder."""
    settings = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    at = "main" if "dev" in version else f"v{version}"
    repository = f"{settings['repo_url']}/blob/{at}"
    shutil.rmtree(folder, ignore_errors=True)
    pages = sources(ROOT)
    for file, page in pages.items():
        to = folder / "pages" / page
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".md"):
            text = (ROOT / file).read_text(encoding="utf-8")
            to.write_text(on_site(text, file, pages, repository), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / file, to)
    made = {"reference/commands.md": commands(), "reference/configuration.md": configuration(), **python()}
    for page, text in made.items():
        to = folder / "pages" / page
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text, encoding="utf-8")
    every = {page for page in [*pages.values(), *made] if page.endswith(".md")}
    settings["nav"], rest = navigation(settings["nav"], every)
    if rest:
        sys.exit(f"zensical.toml: nav: it lacks {', '.join(sorted(rest))}")
    # JSON is YAML, and the tool reads YAML.
    (folder / "zensical.yml").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    print(f"{len(every)} pages")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
