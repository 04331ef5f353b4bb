"""What a reader copies from a page: how to cite holdfast, and the configuration of a run."""

from __future__ import annotations

from typing import Any

import yaml

from holdfast.records.read import FinishedRun
from holdfast.version import __version__

CITATION = {
    "author": "The holdfast maintainers",
    "title": "holdfast: teach a language model one task after another without it forgetting",
    "license": "Apache-2.0",
    "url": "https://github.com/holdfast-learn/holdfast",
}
"""Of CITATION.cff, which an installed package does not have."""


def bibtex() -> str:
    """holdfast as an entry of BibTeX (biblatex's @software); braces keep its name in lower case."""
    fields = CITATION | {"version": __version__}
    lines = [
        f"  {key:<7} = {{{f'{{{value}}}' if key in ('author', 'title') else value}}}," for key, value in fields.items()
    ]
    return "\n".join(["@software{holdfast,", *lines, "}"])


def configuration(run: FinishedRun) -> str:
    """The configuration of a run as YAML, every default written out; `holdfast run` takes it."""
    config: dict[str, Any] = run.config
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)
