"""Write the notebooks of the tutorials: each page of docs/tutorials is the source of the notebook beside it.

`python .ci/notebooks.py` writes docs/tutorials/NAME.ipynb for each NAME.md that has code. In a page,

- a block of `python` or `bash` is a cell, and a block of `text` right below it is what the cell printed;
- a block whose first line is `# FILE` is a cell that writes this file;
- all else is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
BLOCK = re.compile(r"^```(python|bash|yaml)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w-]+\.\w+)\n")
MAGIC = {"python": "", "bash": "%%bash\n"}


def cells(page: str) -> Iterator[nbformat.NotebookNode]:
    """The cells of a page, in order."""
    end = 0
    for block in BLOCK.finditer(page):
        language, code, printed = block.groups()
        file = FILE.match(code)
        if not file and language not in MAGIC:
            continue
        if text := page[end : block.start()].strip():
            yield new_markdown_cell(text)
        source = f"%%writefile {file[1]}\n{code[file.end() :]}" if file else MAGIC[language] + code
        outputs = [new_output("stream", text=printed)] if printed else []
        yield new_code_cell(source.rstrip(), outputs=outputs)
        end = block.end()
    if text := page[end:].strip():
        yield new_markdown_cell(text)


def notebook(page: str) -> str:
    """The notebook of a page, as the file's text."""
    found = list(cells(page))
    for number, cell in enumerate(found, 1):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = new_notebook(cells=found, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def pages() -> list[Path]:
    """The tutorials."""
    return [page for page in sorted(TUTORIALS.glob("*.md")) if page.name != "README.md"]


if __name__ == "__main__":
    for page in pages():
        text = notebook(page.read_text(encoding="utf-8"))
        page.with_suffix(".ipynb").write_text(text, encoding="utf-8")
