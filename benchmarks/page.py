"""The page at its largest: 15 tasks x 10 runs x 1,000 responses, opened and filtered in Chromium.

    python benchmarks/page.py

Prints how large the page is, the processor time of Chromium's main thread until the list of test rows can be used and
until everything is drawn, and that of a keystroke in the filter. Processor time hardly depends on what else the machine
does; on an idle one it is the time that a person waits.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.report import write_report
from holdfast.system.files import read_json, write_json, write_jsonl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.synthetic_runs import make_run

if TYPE_CHECKING:
    from playwright.sync_api import CDPSession

WORDS = ("the", "a", "tide", "holds", "fast", "to", "what", "it", "knew", "moves", "sea", "weed", "rock", "year", "was")
FILTER = """async ([words, change]) => {
    const find = name => document.querySelector(`[data-rows=${name}]`);
    find("change").value = change;
    find("text").value = words;
    find("text").dispatchEvent(new Event("input"));
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
}"""
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def runs(root: Path, tasks: int, count: int, rows: int) -> list[Path]:
    """Directories of runs with as many responses; prompts of 60 words, responses of 1 to 12."""
    names = [f"task {j:02d}" for j in range(tasks)]
    chance = random.Random(0)

    def text(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words))

    questions = [[(text(60), text(3)) for _ in range(rows)] for _ in names]
    paths = []
    for k in range(count):
        path = make_run(
            root / f"run-{k}", "sequential", rows=1, tasks=names, training={"learning_rate": 1e-4 * (k + 1)}
        )
        matrix = read_json(path / "matrix.json")
        for j, asked in enumerate(questions):
            for t in {j + 1, tasks, 0 if j + 1 == tasks else j + 1}:
                lines = []
                for row, (prompt, answer) in enumerate(asked):
                    right = chance.random() < (0.9 if t == j + 1 else 0.5)
                    response = answer if right else text(chance.randrange(1, 12))
                    lines.append(
                        {"row": row, "prompt": prompt, "answer": answer, "response": response, "score": float(right)}
                    )
                (folder,) = path.glob(f"stages/{t:02d}-*")
                write_jsonl(folder / "responses" / f"{names[j]}.jsonl", lines)
                matrix["scores"][t][j] = sum(line["score"] for line in lines) / rows
        write_json(path / "matrix.json", matrix)
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tasks", 15), ("runs", 10), ("rows", 1000), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        paths = runs(Path(folder), asked.tasks, asked.runs, asked.rows)
        began = time.monotonic()
        page_file = write_report(paths, Path(folder, "page.html"))
        print(f"written in {time.monotonic() - began:.1f} s, {page_file.stat().st_size / 1e6:.1f} MB")
        browser = started.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for _ in range(asked.repeats):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            processor = page.context.new_cdp_session(page)
            processor.send("Performance.enable", {"timeDomain": "threadTicks"})

            def busy(processor: CDPSession = processor) -> float:
                """Milliseconds of processor time of the page's main thread so far."""
                found = processor.send("Performance.getMetrics")["metrics"]
                return 1000 * next(metric["value"] for metric in found if metric["name"] == "TaskDuration")

            page.goto(page_file.as_uri(), wait_until="commit")
            page.wait_for_function("() => document.querySelector('#rows')?.dataset.ready")
            ready, ready_after = busy(), page.evaluate("() => Number(document.querySelector('#rows').dataset.ready)")
            page.wait_for_function("() => performance.getEntriesByName('plots in view').length")
            seen = busy()
            page.wait_for_function("() => performance.getEntriesByName('plots').length")
            drawn = busy()
            filters = []
            for words, change in (("t", "lost"), ("ti", "lost"), ("tide rock", "any"), ("", "any"), ("x", "any")):
                before = busy()
                page.evaluate(FILTER, [words, change])
                filters.append(busy() - before)
            shown = ", ".join(f"{value:.0f}" for value in filters)
            print(
                f"processor time until the list is ready {ready:.0f} ms (at {ready_after:.0f} ms by the clock), plots "
                f"in view {seen - ready:.0f} ms more, the others {drawn - seen:.0f} ms; filters {shown} ms"
            )
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
