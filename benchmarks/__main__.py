"""The benchmarks that need no GPU, one after another, in about half an hour on two idle cores; then a table of ratios.

usage: python benchmarks [--only NAME ...] [--model FOLDER] [--quick] [--write]

Each is a script of its own beside this file, with few rounds here. --model names a real model (SmolLM2-135M-Instruct in
RESULTS.md); without one, what needs it is left out. --quick is the least of each, to try the command. --write puts the
table into RESULTS.md, with the machine and the day; rows of benchmarks that were not run stay there.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from holdfast.system.machine import hardware

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
BEGIN, END = "<!-- ratios: begin -->\n", "<!-- ratios: end -->\n"
HEADER = ["| benchmark | of | what | ratio | day |", "|---|---|---|---|---|"]


@dataclass(frozen=True)
class Benchmark:
    """A script and its arguments; MODEL among them stands for the folder of a real model."""

    name: str
    usual: str
    quick: str

    def command(self, quick: bool, model: str | None) -> list[str] | None:
        """None where a real model is needed and there is none."""
        words = (self.quick if quick else self.usual).split()
        if "MODEL" in words and not model:
            return None
        return [sys.executable, str(HERE / f"{self.name}.py"), *(model if w == "MODEL" and model else w for w in words)]


ALL = [
    Benchmark("methods", "--rounds 3 --steps 3", "--rounds 1 --steps 1 --methods replay"),
    Benchmark("tree_lora", "--rounds 3", "--rounds 1 --steps 1 --tasks 2"),
    Benchmark("defaults", "--model MODEL --rounds 2 --steps 2", "--model MODEL --rounds 1 --steps 1"),
    Benchmark("supervised", "--model MODEL --rounds 2 --steps 2 --plain", "--model MODEL --rounds 1 --steps 1"),
    Benchmark("losses", "", "--tokens 64 --vocab 2000 --repeats 1"),
    Benchmark("evaluation", "", "--questions 40"),
    Benchmark("sampling", "--rounds 2", "--rounds 1"),
    Benchmark("lab", "--rounds 2", "--rounds 1 --steps 2"),
    Benchmark("memory", "--sizes 20M 60M", "--sizes 20M --tuners lora"),
]


def ratios(printed: str) -> Iterator[tuple[str, str, str]]:
    """What a row is of, what is divided by what, and the ratio, of each such column of the tables that were printed."""
    header: list[str] = []
    before: list[str] = []
    for line in printed.splitlines():  # a trainer's lines may stand between those of a table
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if set(line) <= set("|-: "):
            header = before
        elif header and len(cells) == len(header):
            row = dict(zip(header, cells, strict=False))
            numbers = [cell for cell in cells[1:] if re.match(r"[\d,.]+", cell)]
            words = [cell for cell in cells if cell and cell not in numbers]
            for column, value in row.items():
                if re.search(r"/ |ratio", column) and re.match(r"[\d.]+", value):
                    yield ", ".join(words), column.replace(" (min..max)", ""), value
        before = cells


def run(benchmark: Benchmark, command: list[str]) -> list[str]:
    """Rows of the table of ratios; what the script prints is shown as it comes."""
    print(f"\n## {benchmark.name}: {' '.join(command[2:])}\n", flush=True)
    start, printed = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    if process.returncode:
        return [f"| {benchmark.name} | failed: exit code {process.returncode} | | | |"]
    print(f"\n{time.monotonic() - start:.0f} s", flush=True)
    return rows_of(benchmark, "".join(printed))


def rows_of(benchmark: Benchmark, printed: str) -> list[str]:
    """Rows of the table of ratios, of what a script printed."""
    day = datetime.datetime.now(datetime.UTC).date()
    return [f"| {benchmark.name} | {of} | {column} | {value} | {day} |" for of, column, value in ratios(printed)]


def written(document: str, about: str, rows: list[str]) -> str:
    """RESULTS.md with the rows in the place of those of the same benchmarks."""
    before, _, rest = document.partition(BEGIN)
    table, _, after = rest.partition(END)
    new = {benchmark_of(row) for row in rows}
    kept = [line for line in table.splitlines() if benchmark_of(line) in names().keys() - new]
    order = list(names())
    every = sorted(kept + rows, key=lambda row: order.index(benchmark_of(row)))
    return before + BEGIN + "".join(f"{line}\n" for line in [about, "", *HEADER, *every]) + END + after


def benchmark_of(row: str) -> str:
    """The first cell of a row of the table."""
    return row.split("|")[1].strip() if row.startswith("|") else ""


def names() -> dict[str, None]:
    """Of the benchmarks, in their order."""
    return {benchmark.name: None for benchmark in ALL}


def main() -> int:
    """Run them, print the ratios; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[b.name for b in ALL], help="these alone")
    parser.add_argument("--model", help="folder of a real model")
    parser.add_argument("--quick", action="store_true", help="the least of each")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    options = parser.parse_args()
    rows = []
    for benchmark in ALL:
        if not options.only or benchmark.name in options.only:
            command = benchmark.command(options.quick, options.model)
            rows += run(benchmark, command) if command else [f"| {benchmark.name} | needs --model | | | |"]
    machine = hardware()
    about = f"{machine['cpu']}, {machine['cores']} cores, {torch.get_num_threads()} threads; "
    about += f"torch {torch.__version__}, transformers {transformers.__version__}"
    print("\n" + "\n".join([about, "", *HEADER, *rows]))
    if options.write:
        RESULTS.write_text(written(RESULTS.read_text(encoding="utf-8"), about, rows), encoding="utf-8")
    return int(any("failed: " in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
