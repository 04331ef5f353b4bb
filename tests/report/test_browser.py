"""The report in a real browser: what a person sees at a desk, on a phone, at night and on paper."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from holdfast.records.changes import changes
from holdfast.records.read import read_run
from holdfast.report import cite, write_report
from holdfast.system.files import read_json
from support.browser import ARGUMENTS, DRAWN, OVERFLOW
from support.synthetic_runs import STAGES, TASKS, make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three methods, a report of each of two kinds, and one of all."""
    root = tmp_path_factory.mktemp("report")
    runs = [make_run(root / method, method, rows=27) for method in ("sequential", "replay", "joint")]
    write_report(runs[1:2], root / "one.html")
    write_report(runs, root / "many.html")
    write_report(runs[2:], root / "kept.html")
    mixed = make_run(root / "mixed", metrics=["loss", "accuracy", "rouge_l", "loss"], finished=False)
    write_report([mixed], root / "mixed.html")
    return root


@pytest.fixture
def visit(browser: Browser, folder: Path) -> Iterator[Callable[..., Page]]:
    """Open a page; at the end nothing may have been complained of, fetched or run that should not."""
    complaints: list[str] = []
    pages = []

    def visit(name: str, width: int = 1280, scheme: Any = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        address = (folder / name).as_uri()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url == address or complaints.append(f"fetched {request.url[:200]}"))
        page.goto(address)
        page.wait_for_function(DRAWN)
        pages.append(page)
        return page

    yield visit
    for page in pages:
        assert page.evaluate("() => window.attacked") is None
        page.close()
    assert complaints == []


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *(("many.html", width) for width in (1280, 390)),
        *(("one.html", 390), ("mixed.html", 390)),
        *(pytest.param(name, 1280, marks=pytest.mark.slow) for name in ("one.html", "mixed.html")),
    ],
)
def test_nothing_is_cut_off_even_with_all_details_open(visit: Callable[..., Page], name: str, width: int) -> None:
    """The page never scrolls sideways. At a desk no table does, and on a phone the score matrix alone, with its map."""
    page = visit(name, width, "dark" if width == 390 else "light")
    assert page.evaluate(OVERFLOW) == 0
    page.evaluate("() => document.querySelectorAll('details').forEach(details => { details.open = true; })")
    page.wait_for_function(DRAWN)
    assert page.evaluate(OVERFLOW) == 0
    cut = page.evaluate(
        "() => [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1)"
        ".map(box => box.ariaLabel)"
    )
    assert not {*cut} - ({"score matrix", "plot; scrolls sideways"} if width == 390 else set())


@pytest.mark.parametrize("width", [390, pytest.param(1280, marks=pytest.mark.slow)])
def test_the_button_that_saves_a_picture_lies_over_nothing_and_answers_have_no_empty_line(
    visit: Callable[..., Page], width: int
) -> None:
    page = visit("one.html", width)
    covered = page.evaluate(
        """() => [...document.querySelectorAll('.plot .modebar')].filter(bar => {
            const [box, drawn, shown] = [bar, bar.closest('.plot').querySelector('.main-svg'), bar.closest('.scroll')]
                .map(part => part.getBoundingClientRect());
            return box.bottom > drawn.top + 1 || box.left < shown.left - 1 || box.right > shown.right + 1;
        }).length"""
    )
    empty = page.evaluate(
        """() => [...document.querySelectorAll('.responses dd')]
            .filter(dd => [...dd.childNodes].some(node => node.nodeType === 3 && node.data.includes('\\n'))).length"""
    )
    assert page.locator(".plot .modebar").count() > 2 and page.locator(".responses dd").count() > 2
    assert (covered, empty) == (0, 0)


def test_the_citation_and_the_configuration_can_be_copied_with_and_without_the_clipboard(
    visit: Callable[..., Page], folder: Path
) -> None:
    page = visit("one.html")
    page.evaluate("() => { navigator.clipboard.writeText = async text => { window.copied = text; }; }")
    button = page.get_by_role("button", name="Copy citation")
    button.click()
    assert page.evaluate("() => window.copied") == cite.bibtex()
    page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(); document.execCommand = () => false; }"
    )
    button.click()
    page.get_by_text("Selected; copy it with").wait_for()
    assert page.evaluate("() => getSelection().toString()").strip() == cite.bibtex()
    page.locator("summary", has_text="Configuration").click()
    page.evaluate("() => { document.execCommand = () => true; }")
    page.get_by_role("button", name="Copy configuration").click()
    selected = page.evaluate("() => getSelection().toString()")
    assert yaml.safe_load(selected) == read_run(folder / "replay").config


def test_show_all_of_what_was_lost_filters_the_list(visit: Callable[..., Page]) -> None:
    page = visit("one.html")
    page.wait_for_function(ROWS)
    group = page.locator("[data-lost][open]")
    rows, _, lost, _ = json.loads(group.get_attribute("data-counts"))
    group.get_by_role("button", name="Show all of them").click()
    assert page.locator("[data-rows=count]").text_content() == f"{lost} of {rows} answers"


def test_a_browser_that_cannot_show_the_plots_says_so(browser: Browser, folder: Path) -> None:
    def warnings(script: str | None = None, **settings: Any) -> tuple[list[str], int]:
        """The warnings that a person sees, and how many plots."""
        with browser.new_context(**settings) as context:
            page = context.new_page()
            failures: list[str] = []
            page.on("pageerror", lambda error: failures.append(str(error)))
            if script:
                page.add_init_script(script)
            page.goto((folder / "one.html").as_uri())
            if not settings:
                page.wait_for_timeout(500) if script else page.wait_for_function(DRAWN)
            assert failures == []
            seen = page.locator("main .warning:visible").all_text_contents()
            return seen, page.locator(".main-svg").count()

    said, plots = warnings()
    assert said == [] and plots > 0
    said, plots = warnings(java_script_enabled=False)
    assert len(said) == 1 and "JavaScript is off" in said[0] and plots == 0
    for missing in ("DecompressionStream", "structuredClone"):
        said, plots = warnings(f"delete window.{missing}")
        assert len(said) == 1 and "cannot unpack" in said[0] and plots == 0


def test_figures_in_the_page_are_those_of_matrix_json(visit: Callable[..., Page], folder: Path) -> None:
    page, matrix = visit("one.html"), read_json(folder / "replay" / "matrix.json")
    shown = page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('[data-figure]')]"
        ".map(e => [e.dataset.figure, [JSON.parse(e.dataset.value), e.firstChild.textContent.trim()]]))"
    )
    assert {key: value for key, (value, _) in shown.items()} == matrix["summary"]
    for value, text in shown.values():
        assert float(text.replace("−", "-")) == pytest.approx(value, abs=5e-4)
    for t, row in enumerate(matrix["scores"]):
        cells = page.locator(f".matrix tr[data-row='{t}'] td").all_text_contents()
        assert cells == [f"{score:.3f}" for score in row]


def test_the_heat_map_is_drawn_with_the_scores_in_it(visit: Callable[..., Page], folder: Path) -> None:
    scores = read_json(folder / "replay" / "matrix.json")["scores"]
    drawn = visit("one.html").locator("[data-section=matrix] .plot .heatmap-label").all_text_contents()
    assert sorted(drawn) == sorted(f"{score:.3f}" for row in scores for score in row)


def test_cells_without_a_score_say_so(visit: Callable[..., Page]) -> None:
    page = visit("many.html")
    joint = page.locator("details.run").nth(2)
    joint.locator("summary").first.click()
    page.wait_for_function(DRAWN)
    notes = joint.locator("[data-section=matrix] .plot .annotation").all_text_contents()
    assert len([note for note in notes if "measured" in note]) == STAGES * (STAGES - 1)


def test_a_run_in_the_comparison_opens_with_plots_that_fit(visit: Callable[..., Page]) -> None:
    page = visit("many.html", 390)
    run = page.locator("details.run").nth(1)
    assert run.locator(".main-svg").count() == 0
    run.locator("summary").first.click()
    page.wait_for_function(DRAWN)
    boxes = run.locator("[data-section=curves] .plot").all()
    assert boxes
    for box in boxes:
        drawn, around = box.locator(".main-svg").first.bounding_box(), box.bounding_box()
        assert drawn is not None
        assert around is not None
        assert 250 < drawn["width"] <= around["width"] + 1 <= 390


def test_plots_and_page_follow_the_setting_while_open(visit: Callable[..., Page]) -> None:
    page = visit("one.html")

    def colours() -> dict[str, Any]:
        return page.evaluate("""() => ({
            page: getComputedStyle(document.body).backgroundColor,
            text: document.querySelector('.plot .xtick text').style.fill,
            cells: document.querySelector('.plot .hm image').getAttribute('href')
                ?? document.querySelector('.plot .hm image').getAttributeNS('http://www.w3.org/1999/xlink', 'href'),
            curve: document.querySelector('.scatterlayer .js-line').style.stroke,
        })""")

    light = colours()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"() => document.querySelector('.plot .xtick text').style.fill !== '{light['text']}'")
    dark = colours()
    assert all(dark[key] != light[key] for key in light)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"() => document.querySelector('.plot .xtick text').style.fill === '{light['text']}'")
    assert colours() == light


def test_paper_is_light_and_plots_fit_it(visit: Callable[..., Page]) -> None:
    page = visit("one.html", scheme="dark")
    fill = "() => document.querySelector('.plot .xtick text').style.fill"
    night = page.evaluate(fill)
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(fill) != night
    widths = page.evaluate(
        "() => [...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert max(widths) <= 680, "an A4 page has 180 mm between margins of 15 mm"
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(fill) == night


ROWS = "() => document.querySelector('#rows').dataset.ready"


def test_test_rows_are_filtered_as_one_types(visit: Callable[..., Page], folder: Path) -> None:
    page = visit("many.html")
    page.wait_for_function(ROWS)
    rows, count = page.locator("#rows .row"), page.locator("[data-rows=count]")
    lost = int(count.text_content().split()[0])
    assert f"{lost} of {27 * STAGES * 3} answers" == count.text_content()
    page.locator("[data-rows=change]").select_option("any")
    assert count.text_content() == f"{27 * STAGES * 3} of {27 * STAGES * 3} answers"
    assert rows.count() < 20, "only what is seen is drawn"
    page.locator("[data-rows=run]").select_option("1")
    page.locator("[data-rows=task]").select_option("2023")
    assert count.text_content() == "27 of 27 answers"
    page.locator("[data-rows=text]").fill("EMOJI maths")
    pairs = changes(read_run(folder / "replay"), TASKS.index("2023")).pairs
    texts = [f"{after['prompt']} {before['response']} {after['response']}".lower() for before, after in pairs]
    assert count.text_content() == f"{sum('emoji' in text and 'maths' in text for text in texts)} of 27 answers"
    page.locator("[data-rows=text]").fill("no such words")
    assert count.text_content() == "0 of 27 answers" and rows.count() == 0


def test_where_no_row_was_lost_the_list_begins_with_all_of_them(visit: Callable[..., Page], folder: Path) -> None:
    run = read_run(folder / "joint")
    found = [changed for j in range(len(run.tasks)) if (changed := changes(run, j))]
    assert found and not any(changed.lost for changed in found)
    page = visit("kept.html")
    page.wait_for_function(ROWS)
    assert page.locator("[data-rows=change]").input_value() == "any"
    assert page.locator("#rows .row").count() > 0


def test_the_list_draws_the_rows_that_it_is_scrolled_to(visit: Callable[..., Page]) -> None:
    page = visit("many.html", 390)
    page.wait_for_function(ROWS)
    page.locator("[data-rows=change]").select_option("any")
    page.evaluate(
        "() => { const list = document.querySelector('[data-rows=list]'); list.scrollTop = list.scrollHeight; }"
    )
    total = 27 * STAGES * 3
    page.wait_for_selector(f"#rows [aria-label='answer {total} of {total}']")
    assert page.locator("#rows .row").count() < 20


def test_a_test_row_opens_with_what_every_run_answered(visit: Callable[..., Page], folder: Path) -> None:
    page = visit("many.html", 390, "dark")
    page.wait_for_function(ROWS)
    page.locator("#rows details summary").click()
    page.locator("#rows .counts button").first.click()
    assert page.locator("[data-rows=run]").input_value() == "0"
    assert page.locator("[data-rows=task]").input_value() == "2022"
    lost = int(page.locator("#rows .counts button").first.text_content().split()[0])
    assert page.locator("[data-rows=count]").text_content().startswith(f"{lost} of 27")
    page.locator("#rows .row").first.click()
    dialog = page.locator("dialog[open]")
    assert dialog.locator(".pair").count() == 3
    assert "expected" in dialog.text_content() and page.evaluate(OVERFLOW) == 0
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_what_cannot_be_seen_can_be_heard(visit: Callable[..., Page]) -> None:
    page = visit("many.html")
    assert page.locator("html").get_attribute("lang") == "en"
    assert "holdfast" in page.title()
    silent = page.evaluate("""() => [
        ...[...document.querySelectorAll('.plot')].filter(p => p.getAttribute('role') !== 'img' || !p.ariaLabel),
        ...[...document.querySelectorAll('table')].filter(t => !t.querySelector('th[scope=row]')),
        ...[...document.querySelectorAll('[tabindex]')].filter(e => !e.closest('.plot') && !e.ariaLabel),
    ].length""")
    assert silent == 0
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
