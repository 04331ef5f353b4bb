"""The figures of the experiments, drawn from their tables: PDF and PNG, as wide as a paper's column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import ConfigError, did_you_mean
from holdfast.lab.derived import interval
from holdfast.lab.findings import matching
from holdfast.lab.tables import TableRow, distinct, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[TableRow]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "pdf.fonttype": 42,
    "svg.hashsalt": "holdfast",
}
METHODS = {
    "none": ("no replay", BLACK, "o"),
    "lora": ("no replay, LoRA", ORANGE, "D"),
    "ntp_real": ("next token, real text", GREEN, "s"),
    "ntp_self": ("next token, own samples", SKY, "v"),
    "ntp_general": ("next token, general text", GREEN, "s"),
    "kl_real": ("KL, real text", BLUE, "^"),
    "kl_self": ("KL, own samples", RED, "P"),
    "kl_general": ("KL, general text", BLUE, "^"),
}
DOMAINS = {"eng": "English", "spa": "Spanish", "web": "web text", "math": "mathematics"}
NATS = "nats per token"
MOST_WRITTEN = 25  # a grid of more cells has no values written into them


@dataclass(frozen=True)
class Tables:
    """What a figure shows: ``results``, a row a run; ``curves``, a row an evaluation; the old and the new domain."""

    results: Rows
    curves: Rows
    old: str | None = None
    new: str | None = None

    @property
    def old_name(self) -> str:
        return DOMAINS.get(self.old or "", self.old or "")

    @property
    def new_name(self) -> str:
        return DOMAINS.get(self.new or "", self.new or "")


def require_matplotlib() -> None:
    """Raise ConfigError if what draws the figures is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError("figure: drawing it needs matplotlib: pip install 'holdfast[lab]'")


def draw(name: str, tables: Tables, path: Path) -> None:
    """Write a figure as ``path`` with ``.pdf`` and ``.png``.

    Args:
        name: of the figure, see ``FIGURES``.

    Raises:
        ConfigError: no figure has this name, or matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl

    if name not in FIGURES:
        raise ConfigError(f"figure: there is no figure {name!r}{did_you_mean(name, FIGURES)}")
    with mpl.rc_context(STYLE):
        figure = FIGURES[name](tables)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
        figure.savefig(path.with_suffix(".png"), metadata={"Software": None})


def method_comparison(tables: Tables) -> Figure:
    """Loss on the old domain against loss on the new one, along each run; on the right, those with replay, enlarged."""
    figure, axes = _figure(6.8, 3.0, columns=2)
    methods = distinct(select(tables.curves, group="finetune"), "method")
    replayed = [method for method in methods if method not in ("none", "lora")]
    for ax, shown in zip(axes, (methods, replayed), strict=True):
        for method in shown:
            label, colour, marker = _look(method, methods.index(method))
            runs = select(tables.curves, group="finetune", method=method)
            for seed in distinct(runs, "seed"):
                line = select(runs, seed=seed)
                ax.plot(
                    _of(line, f"{tables.new}_loss"), _of(line, f"{tables.old}_loss"), color=colour, alpha=0.35, lw=0.9
                )
            ends = select(tables.results, group="finetune", method=method)
            x, y = (interval(_of(ends, f"{name}_loss")) for name in (tables.new, tables.old))
            ax.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], color=colour, marker=marker, ls="", label=label, zorder=3)
        ax.invert_xaxis()
        ax.set_xlabel(f"{tables.new_name} loss ({NATS}), falling")
    axes[0].set_ylabel(f"{tables.old_name} loss ({NATS})")
    axes[0].set_title("Each run, and its end (mean of seeds)")
    axes[1].set_title("With replay, nearer")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def learning_rate(tables: Tables) -> Figure:
    """Forgetting and tokens needed against the learning rate of fine-tuning."""
    figure, (left, right) = _figure(6.6, 3.2, columns=2)
    runs = select(tables.results, group="finetune")
    rates = sorted(distinct(runs, "pretrain_learning_rate"))
    for colour, rate in zip(COLOURS, rates, strict=False):
        for method, style, marker in (("none", "-", "o"), ("kl_real", "--", "^")):
            line = select(runs, pretrain_learning_rate=rate, method=method)
            name = f"pretrained at {_power(rate)}, {METHODS[method][0]}"
            look = {"color": colour, "ls": style, "marker": marker, "label": name}
            _means(left, line, "learning_rate", "forgetting_matched", **look)
            _means(right, [row for row in line if row["stop"] == "loss"], "learning_rate", "tokens", **look)
    for ax in (left, right):
        _log_rates(ax)
        ax.set_xlabel("learning rate of fine-tuning")
    left.set_ylabel(f"rise of {tables.old_name} loss ({NATS})")
    left.set_title(f"Forgetting at equal {tables.new_name} loss")
    right.set_yscale("log")
    right.set_ylabel(f"tokens of {tables.new_name}")
    right.set_title("Training until that loss")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def high_learning_rate_replay(tables: Tables) -> Figure:
    """Forgetting against the tokens that two ways need: a lower learning rate, or more replay at a high one."""
    figure, ax = _figure(4.6, 3.0)
    lines = (
        ("rate", "learning_rate", BLUE, "o", "lower the learning rate"),
        ("replay", "ratio", RED, "P", "replay more"),
    )
    for group, column, colour, marker, label in lines:
        runs = [row for row in select(tables.results, group=group) if row["stop"] == "loss"]
        points = []
        for value in sorted(distinct(runs, column), reverse=group == "rate"):
            rows = select(runs, **{column: value})
            points.append((value, interval(_of(rows, "tokens")), interval(_of(rows, "forgetting_matched"))))
        if not points:
            continue
        xs, ys = [x[0] for _, x, _ in points], [y[0] for _, _, y in points]
        ax.errorbar(xs, ys, yerr=_halves(y for _, _, y in points), color=colour, marker=marker, label=label, zorder=3)
        for value, (x, _), (y, _) in (points[0], points[-1]):
            shown = f"rate {_power(value)}" if group == "rate" else f"share {value:g}"
            ax.annotate(shown, (x, y), xytext=(5, 5), textcoords="offset points", color=colour, fontsize=7)
    _log_counts(ax)
    ax.set_xlabel("training until the target, tokens (replayed ones included)")
    ax.set_ylabel(f"rise of {tables.old_name} loss ({NATS})")
    ax.legend(loc="upper right")
    return figure


def pretrain_length(tables: Tables) -> Figure:
    """Forgetting against the length of pretraining."""
    return _by_weight(tables, "pretrain_tokens_per_parameter", "tokens per parameter in pretraining")


def model_size(tables: Tables) -> Figure:
    """Forgetting against the size of the model."""
    return _by_weight(tables, "parameters", "parameters")


def model_capacity(tables: Tables) -> Figure:
    """The losses in both languages that mixtures reach, and those that fine-tuning with replay reaches."""
    figure, ax = _figure(4.8, 3.3)
    mixtures = select(tables.results, group="mixture")
    points = []
    for share in sorted(distinct(mixtures, "spanish")):
        rows = select(mixtures, spanish=share)
        points.append((share, interval(_of(rows, f"{tables.new}_loss")), interval(_of(rows, f"{tables.old}_loss"))))
    ax.plot([x[0] for _, x, _ in points], [y[0] for _, _, y in points], color=BLACK, lw=1, zorder=1)
    shares = [share for share, _, _ in points]
    image = ax.scatter(
        [x[0] for _, x, _ in points], [y[0] for _, _, y in points], c=shares, cmap="cividis", vmin=0, vmax=1, s=26,
        edgecolors=BLACK, linewidths=0.6, zorder=3, label="pretrained on both, long",
    )  # fmt: skip
    figure.colorbar(image, ax=ax, label="share of Spanish in pretraining", pad=0.02)
    for group, colour, marker, label in (
        ("finetune", RED, "P", "fine-tuned with KL to own samples, after long pretraining"),
        ("finetune_short", BLUE, "^", "the same, after short pretraining"),
    ):
        runs = select(tables.results, group=group)
        if not runs:
            continue
        starts = interval(_of(runs, f"{tables.new}_start"))[0], interval(_of(runs, f"{tables.old}_start"))[0]
        ax.plot(*starts, marker="x", color=colour, ls="", markersize=7, mew=2, zorder=4)
        xs, ys = [], []
        for weight in sorted(distinct(runs, "weight"), reverse=True):
            rows = select(runs, weight=weight)
            xs.append(interval(_of(rows, f"{tables.new}_loss"))[0])
            ys.append(interval(_of(rows, f"{tables.old}_loss"))[0])
        ax.plot(
            [starts[0], *xs],
            [starts[1], *ys],
            color=colour,
            marker=marker,
            markevery=range(1, len(xs) + 1),
            label=label,
        )
    ax.set_xlabel(f"{tables.new_name} loss ({NATS})")
    ax.set_ylabel(f"{tables.old_name} loss ({NATS})")
    ax.legend(loc="center right")
    return figure


def grid_2d(tables: Tables) -> Figure:
    """Compute multiplier over sizes and lengths of pretraining, without replay and with."""
    figure, axes = _figure(6.4, 2.9, columns=2)
    runs = select(tables.results, group="finetune")
    sizes, lengths = (sorted(distinct(runs, column)) for column in ("parameters", "pretrain_tokens_per_parameter"))
    grids = {}
    for method in ("none", "kl_real"):
        cells = [
            [select(runs, method=method, parameters=size, pretrain_tokens_per_parameter=length) for size in sizes]
            for length in lengths
        ]
        grids[method] = [[interval(_of(cell, "compute_multiplier"))[0] for cell in row] for row in cells]
    low = min(value for grid in grids.values() for row in grid for value in row)
    image = None
    for ax, (method, grid) in zip(axes, grids.items(), strict=True):
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap="cividis", vmin=low, vmax=1)
        for y, row in enumerate(grid if len(sizes) * len(lengths) <= MOST_WRITTEN else []):
            for x, value in enumerate(row):
                ax.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if value < (1 + low) / 2 else "black",
                )
        ax.set_xticks(range(len(sizes)), [_millions(size) for size in sizes])
        ax.set_yticks(range(len(lengths)), [f"{length:g}" for length in lengths])
        ax.set_xlabel("parameters")
        ax.set_title("No replay" if method == "none" else "KL to the model on real text")
        ax.grid(False)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("tokens per parameter")
    figure.colorbar(image, ax=axes, label="compute multiplier", pad=0.02)
    return figure


def capacity_slices(tables: Tables) -> Figure:
    """Forgetting along both sides of the grid, along a few lines of each."""
    figure, (left, right) = _figure(6.6, 3.2, columns=2)
    runs = select(tables.results, group="finetune")
    slices = (
        (left, "pretrain_tokens_per_parameter", "parameters", "tokens per parameter in pretraining", _millions),
        (right, "parameters", "pretrain_tokens_per_parameter", "parameters", "{:g}".format),
    )
    for ax, x, line, label, name in slices:
        values = sorted(distinct(runs, line))
        for colour, value in zip((SKY, BLUE, PURPLE, BLACK), values[:: -(-len(values) // 4)], strict=False):
            for method, style, marker in (("none", "-", "o"), ("kl_real", "--", "^")):
                rows = select(runs, method=method, **{line: value})
                look = {"label": name(value)} if method == "none" else {}
                _means(ax, rows, x, "forgetting_matched", color=colour, ls=style, marker=marker, **look)
        ax.set_xscale("log")
        ax.set_xlabel(label)
        _ticks(ax, distinct(runs, x), _millions if x == "parameters" else "{:g}".format)
        ax.axhline(0, color=BLACK, lw=0.6)
        lines = "parameters" if line == "parameters" else "tokens per parameter"
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, title=lines, title_fontsize=7.5)
    left.set_ylabel(f"rise of {tables.old_name} loss ({NATS})")
    left.set_title("Length of pretraining (dashed: KL, real text)")
    right.set_title("Size of the model (dashed: KL, real text)")
    return figure


def toy_continual(tables: Tables) -> Figure:
    """Accuracy on each task after each stage, without replay and with."""
    figure, axes = _figure(6.6, 3.0, columns=2, sharey=True)
    tasks = {"add": "addition", "reversal": "reversal", "sort": "sorting", "modadd": "modular addition"}
    for ax, replay in zip(axes, ("none", "kl_self"), strict=True):
        for colour, marker, (task, label) in zip(COLOURS, "osv^", tasks.items(), strict=False):
            points: dict[int, tuple[float, float | None]] = {}
            for number, stage in enumerate(tasks):
                rows = (
                    select(tables.results, group=stage)
                    if stage == "add"
                    else select(tables.results, group=stage, replay=replay)
                )
                if rows:
                    points[number] = interval([100 * row[f"accuracy_{task}"] for row in rows])
            means = [mean for mean, _ in points.values()]
            ax.errorbar(list(points), means, yerr=_halves(points.values()), color=colour, marker=marker, label=label)
        ax.set_xticks(range(len(tasks)), list(tasks.values()), rotation=15)
        ax.set_xlabel("learned last")
        ax.set_ylim(-3, 108)
        ax.set_title("No replay" if replay == "none" else "KL to the model on its own samples")
    axes[0].set_ylabel("answers right (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def regression_1d(tables: Tables) -> Figure:
    """One seed: the old curve, and what the ensemble predicts after learning the new points."""
    figure, axes = _figure(6.6, 2.5, columns=2, sharey=True)
    shown = select(tables.curves, seed=min(distinct(tables.curves, "seed")))
    old = select(shown, phase="old")
    for ax, weight in zip(axes, sorted(distinct(tables.results, "weight")), strict=True):
        tuned = select(shown, phase=weight)
        ax.plot(_of(old, "x"), _of(old, "median"), color=BLACK, ls=":", lw=1.2, label="before")
        ax.fill_between(_of(tuned, "x"), _of(tuned, "low"), _of(tuned, "high"), color=BLUE, alpha=0.25, lw=0)
        ax.plot(_of(tuned, "x"), _of(tuned, "median"), color=BLUE, label="after (median, quartiles)")
        for phase, colour in (("old points", ORANGE), ("new points", GREEN)):
            points = select(shown, phase=phase)
            ax.plot(_of(points, "x"), _of(points, "median"), ".", color=colour, markersize=4, label=phase, zorder=3)
        rows = select(tables.results, weight=weight)
        error = interval(_of(rows, "old_rmse"))[0]
        name = "No regularisation" if weight == 0 else f"KL to the old posterior, weight {weight:g}"
        ax.set_title(f"{name}\nerror on old points {error:.3f}")
        ax.set_xlabel("x")
        ax.set_ylim(-2.6, 2.6)
    axes[0].set_ylabel("y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def instruct(tables: Tables) -> Figure:
    """General ability of an instruction-tuned model against what it learned of a domain."""
    runs = [row for row in tables.results if row["group"] in ("domain", "plain")]
    chats = select(tables.results, group="chat")
    panels = [("choices", 100, "multiple choice right (%)", _of(runs, "choices_start"))]
    if chats:
        panels.append(("chat_loss", 1, f"loss on chats ({NATS})", _of(chats, "chat_loss")))
    figure, axes = _figure(3.4 * len(panels), 2.9, columns=len(panels), squeeze=False)
    for ax, (column, factor, label, start) in zip(axes[0], panels, strict=True):
        ax.axhline(factor * interval(start)[0], color=BLACK, ls=":", lw=1, label="before")
        for number, method in enumerate(distinct(runs, "method")):
            name, colour, marker = _look(method, number)
            rows = select(runs, method=method)
            x, y = interval(_of(rows, f"{tables.new}_loss")), interval([factor * row[column] for row in rows])
            ax.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], color=colour, marker=marker, ls="", label=name)
        ax.invert_xaxis()
        ax.set_xlabel(f"loss on the domain ({NATS})")
        ax.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


FIGURES: dict[str, Callable[[Tables], Any]] = {
    function.__name__: function
    for function in (
        method_comparison,
        learning_rate,
        high_learning_rate_replay,
        pretrain_length,
        model_size,
        model_capacity,
        grid_2d,
        capacity_slices,
        toy_continual,
        regression_1d,
        instruct,
    )
}


def _by_weight(tables: Tables, column: str, label: str) -> Any:
    """Forgetting of the runs that reached their target: without replay, at each weight of the KL, and at the best."""
    figure, ax = _figure(4.6, 3.0)
    runs = select(tables.results, group="finetune")
    reached = [row for row in runs if row["stop"] == "loss"]
    plain, replayed = select(reached, method="none"), [row for row in reached if row.get("method") != "none"]
    if plain:
        _means(ax, plain, column, "forgetting", color=BLACK, marker="o", label="no replay")
    weight = "method" if distinct(replayed, "method") else "weight"
    for number, value in enumerate(distinct(replayed, weight)):
        look = {"color": RED, "alpha": 0.4, "lw": 0.9, "markersize": 3, "label": "" if number else "KL, each weight"}
        _means(ax, select(replayed, **{weight: value}), column, "forgetting", marker=".", **look)
    least = [
        min(rows, key=lambda row: row["forgetting"])
        for seed in distinct(replayed, "seed")
        for x in distinct(replayed, column)
        if (rows := select(replayed, seed=seed, **{column: x}))
    ]
    _means(ax, least, column, "forgetting", color=RED, marker="^", label="KL, best weight")
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.axhline(0, color=BLACK, lw=0.6)
    _ticks(ax, distinct(runs, column), _millions if column == "parameters" else "{:g}".format)
    rises = _of(reached, "forgetting")
    ax.set_ylim(min(-0.002, 1.2 * min(rises)), 1.5 * max(rises))
    ax.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    ax.set_yticks([], minor=True)
    ax.set_xlabel(label)
    ax.set_ylabel(f"rise of {tables.old_name} loss ({NATS})")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of this size in inches, without any window, and its axes in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns, **options)


def _means(ax: Axes, rows: Rows, x: str, y: str, **look: Any) -> None:
    """Means over seeds with their intervals, along x."""
    measured = [row for row in rows if row.get(y) is not None]
    xs = sorted(distinct(measured, x))
    points = [interval(_of(matching(measured, {x: value}), y)) for value in xs]
    ax.errorbar(xs, [mean for mean, _ in points], yerr=_halves(points), **look)


def _look(method: str, number: int) -> tuple[str, str, str]:
    """Label, colour and marker of a method; one that ``METHODS`` lacks is labelled with its name."""
    return METHODS.get(method, (method, COLOURS[number % len(COLOURS)], "o"))


def _halves(points: Any) -> list[float]:
    return [half or 0.0 for _, half in points]


def _of(rows: Rows, column: str) -> list[Any]:
    return [row[column] for row in rows]


def _ticks(ax: Axes, values: Sequence[float], name: Callable[[float], str]) -> None:
    """Ticks at the points only."""
    ax.set_xticks(sorted(values), [name(value) for value in sorted(values)])
    ax.set_xticks([], minor=True)


def _log_counts(ax: Axes) -> None:
    """A logarithmic x axis of counts; even less than a decade has a few ticks."""
    _log_x(ax, (1, 2, 5), _millions)


def _log_rates(ax: Axes) -> None:
    """A logarithmic x axis of learning rates."""
    _log_x(ax, (1, 3), lambda value: f"{value:.0e}".replace("e-0", "e−"))


def _log_x(ax: Axes, steps: tuple[int, ...], name: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    ax.xaxis.set_minor_locator(NullLocator())


def _millions(value: float) -> str:
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value / 1e3:.0f} k"


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    mantissa = mantissa.removesuffix(".0")
    times = "" if mantissa == "1" else rf"{mantissa} \times "
    return rf"${times}10^{{{int(exponent)}}}$"
