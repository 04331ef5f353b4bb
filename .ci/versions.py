"""Put a built site beside those of other versions, as the theme's version selector reads them.

`python .ci/versions.py SITE FOLDER VERSION` copies SITE to FOLDER/VERSION, which FOLDER/versions.json then lists.
FOLDER/latest is a copy of the newest release, or of the only version while there is no release; FOLDER/index.html leads
there.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

REDIRECT = """<!doctype html>
<meta charset="utf-8">
<title>holdfast</title>
<meta http-equiv="refresh" content="0; url=latest/">
<a href="latest/">The documentation of the latest version</a>
"""


def age(version: str) -> tuple[int, ...]:
    """What sorts versions: releases by their numbers, above `main`, which has none."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def add(site: Path, folder: Path, version: str) -> list[str]:
    """Add a version, or put it in the place of an earlier build; the versions, newest first."""
    if not re.fullmatch(r"main|\d+\.\d+", version):
        sys.exit(f"{version}: is no version of the documentation; main or 1.2 would be")
    listed = folder / "versions.json"
    known = [one["version"] for one in json.loads(listed.read_text(encoding="utf-8"))] if listed.is_file() else []
    versions = sorted({*known, version}, key=age, reverse=True)
    for place in [version, *(["latest"] if version == versions[0] else [])]:
        shutil.rmtree(folder / place, ignore_errors=True)
        shutil.copytree(site, folder / place)
    entries = [{"version": one, "title": one, "aliases": ["latest"] * (one == versions[0])} for one in versions]
    listed.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(REDIRECT, encoding="utf-8")
    (folder / ".nojekyll").touch()
    return versions


if __name__ == "__main__":
    print(*add(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
