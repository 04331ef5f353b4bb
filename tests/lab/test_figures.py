"""Figures: every experiment's, from its published table; axes have names, and both files are written."""

from pathlib import Path

import matplotlib as mpl
import pytest

from holdfast.errors import ConfigError
from holdfast.lab import figures
from holdfast.lab.experiment import load_experiment
from holdfast.lab.figures import FIGURES, METHODS, STYLE, Tables, draw
from holdfast.lab.tables import read_table
from holdfast.lab.work import run_experiment
from support.paths import ROOT

EXPERIMENTS = ROOT / "experiments" / "lab"
PUBLISHED = sorted(EXPERIMENTS.glob("*/results/tiny"))


def tables(folder: Path) -> Tables:
    experiment = load_experiment(folder.parents[1] / "tiny.yaml")
    curves = read_table(folder / "curves.csv") if (folder / "curves.csv").exists() else []
    return Tables(read_table(folder / "results.csv"), curves, experiment.old, experiment.new)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.parents[1].name)
def test_every_axis_is_named_and_every_series_explained(folder):
    name = load_experiment(folder.parents[1] / "tiny.yaml").figure
    with mpl.rc_context(STYLE):
        figure = FIGURES[name](tables(folder))
    assert figure.axes[0].get_ylabel()
    for ax in figure.axes:
        assert ax.get_xlabel() or ax.get_ylabel(), f"an axis of {name} has no name"
        assert ax.has_data()
    named = [
        text.get_text() for box in [figure, *figure.axes] for legend in legends(box) for text in legend.get_texts()
    ]
    assert len(set(named)) == len(named)
    assert named or figure.axes[-1].get_ylabel()  # a colour bar


def legends(box):
    return box.legends if hasattr(box, "legends") else [box.get_legend()] if box.get_legend() else []


def test_a_figure_is_written_twice_and_the_same_bytes_again(tmp_path):
    rows = [
        {"group": "finetune", "method": method, "seed": seed, "step": at, "eng_loss": 3 + at * cost, "spa_loss": 6 - at}
        for method, cost in (("none", 0.5), ("kl_self", 0.1))
        for seed in (0, 1)
        for at in (0, 1, 2)
    ]
    shown = Tables([row for row in rows if row["step"] == 2], rows, "eng", "spa")
    for name in ("one", "other"):
        draw("method_comparison", shown, tmp_path / name)
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    assert mpl.rcParams["font.size"] != STYLE["font.size"]  # the caller's settings are left as they were


def test_an_unknown_figure_is_told():
    with pytest.raises(ConfigError, match="no figure 'grid'"):
        draw("grid", Tables([], []), Path("never"))


def test_an_experiment_says_at_once_that_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install 'holdfast\[lab\]'"):
        run_experiment(
            load_experiment(EXPERIMENTS / "method_comparison" / "tiny.yaml"), tmp_path / "out", cache=tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_methods_are_told_apart_without_colour():
    looks = {name: look for name, look in METHODS.items() if not name.endswith("general")}
    assert len({marker for _, _, marker in looks.values()}) == len(looks)
    assert len({colour for _, colour, _ in looks.values()}) == len(looks)


def test_sizes_and_rates_are_written_as_in_a_paper():
    assert figures._millions(216_512) == "217 k"
    assert figures._millions(2_100_000) == "2.1 M"
    assert figures._power(1e-3) == "$10^{-3}$"
    assert figures._power(2.5e-4) == r"$2.5 \times 10^{-4}$"
