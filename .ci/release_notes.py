"""Print the release notes of a version: its section of CHANGELOG.md, with links that lead to its tag.

`python .ci/release_notes.py 0.2.0`; `Unreleased` prints what the next version will have.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parent.parent / "CHANGELOG.md"
REPOSITORY = "https://github.com/holdfast-learn/holdfast"


def notes(changelog: str, version: str) -> str:
    """The section of a version, without its heading.

    Args:
        changelog: the text of CHANGELOG.md.
        version: without v, as its heading has it.
    """
    sections = dict(re.findall(r"^## \[(.+?)\][^\n]*\n(.*?)(?=^## |^\[[^\]]+\]: |\Z)", changelog, re.M | re.S))
    text = sections.get(version, "").strip()
    if not text:
        sys.exit(f"CHANGELOG.md: there is no section {version}; there are {', '.join(sections)}")
    at = "main" if version == "Unreleased" else f"v{version}"
    return re.sub(r"\]\((?!https?:|mailto:)([^)\s]+)\)", rf"]({REPOSITORY}/blob/{at}/\1)", text) + "\n"


if __name__ == "__main__":
    print(notes(CHANGELOG.read_text(encoding="utf-8"), sys.argv[1]), end="")
