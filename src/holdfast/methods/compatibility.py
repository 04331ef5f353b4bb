"""Which tuner goes with which method, as the methods declare it.

`python -m holdfast.methods.compatibility > docs/grid.md` writes the page.
"""

from __future__ import annotations

from holdfast.api.method import Method
from holdfast.methods import METHODS
from holdfast.tuners import TUNERS


def refusal(method: Method | type[Method], tuner: str) -> str | None:
    """Why a method cannot be used with a tuner, and with which it can; None where it can."""
    if not method.tuners or tuner in method.tuners:
        return None
    reason = f", since {method.tuners_reason}" if method.tuners_reason else ""
    return f"method {method.name!r} works with {' or '.join(method.tuners)}, not with {tuner!r}{reason}"


def grid() -> dict[tuple[str, str], str | None]:
    """For each (method, tuner) of holdfast's own: why it is refused; None where they go together."""
    return {
        (name, tuner): refusal(METHODS.find(name), tuner)
        for name in sorted(METHODS.own)
        for tuner in sorted(TUNERS.own)
    }


def page() -> str:
    """docs/grid.md: the grid as a Markdown table, and the reasons below it."""
    cells = grid()
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = [HEAD, "| method | " + " | ".join(f"`{tuner}`" for tuner in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        marks = ["–" if cells[row, tuner] else "yes" for tuner in columns]
        lines.append(f"| `{row}` | " + " | ".join(marks) + " |")
    lines.append(REASONS)
    for row in rows:
        method = METHODS.find(row)
        if method.tuners:
            names = ", ".join(f"`{tuner}`" for tuner in method.tuners)
            lines.append(f"- `{row}` works with {names}: {method.tuners_reason}.")
    return "\n".join(lines) + "\n"


HEAD = """\
# Which tuner works with which method

<!-- Written by `python -m holdfast.methods.compatibility > docs/grid.md`. -->

*yes*: the pair trains, continues bit for bit after a kill, evaluates and saves. *–*: `holdfast check` and
`holdfast run` refuse the pair, with the reason and what works instead. `tests/whole/test_grid.py` tests each cell on a
tiny model: a refused pair is run there without this table, and must end with an error of the method that names what the
model lacks.
[The tuners](tuners/README.md); each method has a page in `docs/methods/`.
"""

REASONS = """
Some methods need a property that few tuners have, and work only with these:
"""

if __name__ == "__main__":
    print(page(), end="")
