"""An experiment: a grid of laboratory runs from one YAML file, and the tables, figure and findings that it yields."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import BeforeValidator, Field, model_validator

import holdfast
from holdfast.config import Named, Section, as_named, load
from holdfast.errors import ConfigError, did_you_mean
from holdfast.files import read_json, read_jsonl, write_json, write_text
from holdfast.lab.derived import compute_multiplier, loss_at_matched
from holdfast.lab.findings import Finding, judge, markdown, matching
from holdfast.lab.regression import RegressionConfig
from holdfast.lab.sources import Data, Files, data_of, digest
from holdfast.lab.tables import Row, read_table, write_table
from holdfast.progress import Progress

DONE = "done.json"  # written last into a run's folder: what was measured of its model beside the losses
TABLES = ("results.csv", "curves.csv")


class Group(Section):
    """Runs that differ by a grid: pretraining, or what goes on from another group's models."""

    origin: str | None = Field(None, alias="from", description="the group whose models these runs go on from")
    where: dict[str, Any] = Field(default_factory=dict, description="columns and values of the models to go on from")
    match: list[str] = Field(
        default_factory=list, description="columns of the grid in which a run equals the run that it goes on from"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="keys of a laboratory run, over those of `common`")
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="columns: a dotted key with its values, or a name with what each of its values changes",
    )


class Experiment(Section):
    """What is run, at which seeds, and which claims it decides."""

    title: str = Field(description="what is asked, in one line")
    data: Annotated[Named, BeforeValidator(as_named)] = Field(
        Named(name="languages"), description="what the runs read: languages, texts, arithmetic or chats, with options"
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="every run is done with each")
    common: dict[str, Any] = Field(default_factory=dict, description="keys of every laboratory run")
    runs: dict[str, Group] = Field(default_factory=dict, description="groups of runs, each after those it goes on from")
    regression: RegressionConfig | None = Field(None, description="instead of runs: regression in one dimension")
    slices_of: str | None = Field(None, description="instead of runs: the experiment whose table this one looks at")
    old: str | None = Field(None, description="the domain of pretraining, which may be forgotten")
    new: str | None = Field(None, description="the domain of fine-tuning")
    matched: float | None = Field(None, description="loss on the new domain at which forgetting is compared")
    figure: str = Field(description="name of the figure")
    findings: list[Finding] = Field(default_factory=list, description="the claims")

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if sum(map(bool, (self.runs, self.regression, self.slices_of))) != 1:
            raise ValueError("give exactly one of runs, regression and slices_of")
        seen: dict[str, Group] = {}
        for name, group in self.runs.items():
            if group.origin is not None and group.origin not in seen:
                raise ValueError(
                    f"runs.{name}.from: no group before it is {group.origin!r}{did_you_mean(group.origin, seen)}"
                )
            seen[name] = group
        return self


@dataclass(frozen=True)
class Planned:
    """One run of the grid.

    Attributes:
        own: the values by which it differs from others of its group.
        inherited: those of the runs that it goes on from, under ``GROUP_NAME``.
        config: keys of the laboratory run, with ``$NAME`` where a token file's path will stand.
        key: stands for all that its result depends on, so that experiments share the runs that they have in common.
    """

    group: str
    own: Row
    inherited: Row
    seed: int
    config: dict[str, Any] = field(repr=False)
    parent: Planned | None = field(repr=False)
    key: str

    @property
    def columns(self) -> Row:
        return self.inherited | self.own

    @property
    def name(self) -> str:
        values = [f"{column} {value}" for column, value in self.columns.items()]
        return ", ".join([self.group, *values, f"seed {self.seed}"])

    def folder(self, cache: Path) -> Path:
        return cache / "runs" / f"{self.group}-{self.key}"

    def is_done(self, cache: Path) -> bool:
        return (self.folder(cache) / DONE).exists()


def find(name: str, scale: str) -> Path:
    """The YAML file of an experiment: a path, or a name in ``experiments/`` here or beside holdfast's own source.

    Raises:
        ConfigError: there is none of this name or scale.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    places = [Path("experiments"), Path(holdfast.__file__).parents[2] / "experiments"]
    known = {path.parent.name for place in places for path in place.glob("*/*.yaml")}
    for place in places:
        if (place / name / f"{scale}.yaml").is_file():
            return place / name / f"{scale}.yaml"
    raise ConfigError(f"no experiment {name!r} at scale {scale!r}{did_you_mean(name, known)}")


def load_experiment(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Experiment:
    """Read an experiment: a YAML file or the mapping that it holds, with ``key.path=value`` changes.

    Raises:
        ConfigError: a key is unknown, missing or wrong; the message names it and a near name.
    """
    experiment: Experiment = load(Experiment, source, overrides)
    return experiment


def expand(experiment: Experiment, data: Data, seeds: Sequence[int] | None = None) -> list[Planned]:
    """Every run of the grid, each after the one that it goes on from.

    Raises:
        ConfigError: a value stands for a token file that there is not, or no model is there to go on from.
    """
    basis = [experiment.data.name, data.identity()]
    done: dict[str, list[Planned]] = {}
    for name, group in experiment.runs.items():
        done[name] = []
        for seed in experiment.seeds if seeds is None else seeds:
            for columns, patch in _cells(group):
                config = merge(merge(merge(experiment.common, group.config), patch), {"seed": seed})
                parents: list[Planned | None] = [None]
                if group.origin is not None:
                    parents = [p for p in done[group.origin] if p.seed == seed and _fits(p, group, columns)]
                    if not parents:
                        raise ConfigError(f"runs.{name}: no run of {group.origin} has {columns | group.where}")
                for parent in parents:
                    inherited = {} if parent is None else _inherited(parent, group)
                    full = config if parent is None else config | {"model": {"path": parent.key}}
                    key = digest([basis, full])
                    done[name].append(Planned(name, columns, inherited, seed, full, parent, key))
    return list(itertools.chain(*done.values()))


def resolve(run: Planned, files: Files, cache: Path) -> dict[str, Any]:
    """The laboratory run's configuration, with paths for names.

    Raises:
        ConfigError: no token file has a name that stands in it.
    """

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(below) for key, below in value.items()}
        if isinstance(value, list):
            return [filled(below) for below in value]
        if isinstance(value, str) and value.startswith("$"):
            if value[1:] not in files:
                raise ConfigError(f"{run.name}: no token file is {value!r}{did_you_mean(value[1:], files)}")
            return str(files[value[1:]])
        return value

    config: dict[str, Any] = filled(run.config)
    if run.parent is not None:
        config["model"] = {"path": str(run.parent.folder(cache) / "model")}
    return config | {"output": str(run.folder(cache))}


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    cache: Path = Path("runs/lab"),
    seeds: Sequence[int] | None = None,
    processes: int = 2,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Do the runs that are not done yet, and write tables, figure and findings.

    Args:
        out: gets results.csv, curves.csv, figure.pdf, figure.png, findings.json and findings.md.
        cache: keeps data and runs; experiments that share it share what they have in common.
        seeds: instead of the experiment's own. The tables hold the runs of all of these that are done.
        processes: runs at work at the same time, one thread each.
        progress: where to show progress; standard error where absent.

    Returns:
        the findings, as :func:`holdfast.lab.findings.judge` gives them.

    Raises:
        UserError: a configuration or source cannot be used.
        Interrupted: SIGINT or SIGTERM asked it to stop; the same call continues.
    """
    progress = progress or Progress()
    if experiment.slices_of is not None:
        results, curves = (
            read_table(out.parents[2] / experiment.slices_of / "results" / out.name / name) for name in TABLES
        )
    elif experiment.regression is not None:
        results, curves = _regressions(experiment.regression, experiment.seeds if seeds is None else seeds, progress)
    else:
        data = data_of(experiment.data, "experiment")
        folder = cache / "data" / f"{experiment.data.name}-{digest(data.identity())}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            files = data.prepare(folder)
        wanted = expand(experiment, data, seeds)
        _work_off(wanted, experiment, files, cache, processes, progress)
        known = {run.key: run for run in (*expand(experiment, data), *wanted)}
        results, curves = tables(experiment, [run for run in known.values() if run.is_done(cache)], cache)
    for name, rows in zip(TABLES, (results, curves), strict=True):
        write_table(out / name, rows)
    return redraw(experiment, out)


def redraw(experiment: Experiment, out: Path) -> list[dict[str, Any]]:
    """Make figure and findings from the tables that are in ``out``.

    Raises:
        DataError: there are no tables.
    """
    from holdfast.lab.figures import draw

    results, curves = (read_table(out / name) for name in TABLES)
    draw(experiment.figure, results, curves, out / "figure")
    findings = [judge(finding, results) for finding in experiment.findings]
    write_json(out / "findings.json", findings)
    write_text(out / "findings.md", markdown(findings))
    return findings


def tables(experiment: Experiment, runs: Sequence[Planned], cache: Path) -> tuple[list[Row], list[Row]]:
    """A row a run, and a row an evaluation, of the runs that are done.

    Of each domain ``DOMAIN_start``, ``DOMAIN_loss`` (at the end) and ``DOMAIN_kl``, in nats a token. Of a run that goes
    on from another: ``forgetting``, the rise of the old domain's loss; ``forgetting_matched``, that rise where the new
    domain's loss came to ``matched``; ``compute_multiplier``, over the evaluations of the run it goes on from.
    """
    results, curves = [], []
    for run in runs:
        folder = run.folder(cache)
        result, evaluations = read_json(folder / "result.json"), read_jsonl(folder / "evaluations.jsonl")
        columns = {"group": run.group, **run.columns, "seed": run.seed, "run": run.key}
        losses = {name: [e["domains"][name]["loss"] for e in evaluations] for name in evaluations[0]["domains"]}
        row = columns | {key: result[key] for key in ("parameters", "tokens", "seconds", "stop")}
        for name, values in losses.items():
            row |= {
                f"{name}_start": values[0],
                f"{name}_loss": values[-1],
                f"{name}_kl": evaluations[-1]["domains"][name]["kl"],
            }
        if run.parent is not None and experiment.old in losses:
            old = losses[experiment.old]
            row["forgetting"] = old[-1] - old[0]
            if experiment.matched is not None and experiment.new in losses:
                matched = loss_at_matched(losses[experiment.new], old, experiment.matched)
                row["forgetting_matched"] = None if matched is None else matched - old[0]
            before = read_jsonl(run.parent.folder(cache) / "evaluations.jsonl")
            if experiment.old in before[0]["domains"]:
                curve = [e["domains"][experiment.old]["loss"] for e in before]
                row["compute_multiplier"] = compute_multiplier([e["tokens"] for e in before], curve, old[-1])
        results.append(row | read_json(folder / DONE))
        for i, evaluation in enumerate(evaluations):
            at = {key: evaluation[key] for key in ("step", "tokens", "seconds")}
            curves.append(columns | at | {f"{name}_loss": values[i] for name, values in losses.items()})
    return results, curves


@dataclass(frozen=True)
class Cost:
    """What a group of runs takes: ``tokens`` and ``flops`` are None where only a loss or the data's size decides."""

    group: str
    runs: int
    parameters: tuple[int, int]
    tokens: int | None
    flops: float | None


def check_experiment(experiment: Experiment) -> list[Cost]:
    """Validate every run of the grid without any data, and count what it would take.

    Returns:
        of each group: runs, least and most parameters (the embeddings counted once), tokens trained on at most, and
        6 x parameters x tokens floating-point operations, rehearsal apart.

    Raises:
        ConfigError: a key of a run is wrong, or its method does not go with its tuner.
    """
    from holdfast import methods, tuners
    from holdfast.compatibility import refusal
    from holdfast.lab.config import load_lab_config

    if not experiment.runs:
        return []
    data = data_of(experiment.data, "experiment")
    files = {name: Path("tokens", name) for name in data.names()}
    costs: dict[str, list[tuple[int, float | None]]] = {name: [] for name in experiment.runs}
    sizes: dict[str, int] = {}
    for run in expand(experiment, data):
        try:
            config = load_lab_config(resolve(run, files, Path("runs")))
            for method in methods.build([(method.name, method.options) for method in config.method]):
                if reason := refusal(method, config.tuner.name):
                    raise ConfigError(f"tuner: {reason}")
            tuners.build(config.tuner)
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from None
        size = (
            sizes[run.parent.key]
            if run.parent
            else _parameters(config.model.model_dump_json(), data.vocabulary(), config.context)
        )
        sizes[run.key] = size
        stop = config.stop
        bounds = [stop.tokens, stop.tokens_per_parameter and stop.tokens_per_parameter * size]
        costs[run.group].append((size, min((bound for bound in bounds if bound), default=None)))
    return [_cost(group, runs) for group, runs in costs.items()]


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` with what ``above`` says; sections are merged key by key, anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _cells(group: Group) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Columns of each cell of a grid, and what it changes."""
    axes: list[list[tuple[str, Any, dict[str, Any]]]] = []
    for key, values in group.grid.items():
        if isinstance(values, dict):
            axes.append([(key, value, patch) for value, patch in values.items()])
        else:
            axes.append([(key.rpartition(".")[2], value, _nested(key, value)) for value in values])
    for cell in itertools.product(*axes):
        patch: dict[str, Any] = {}
        for _, _, change in cell:
            patch = merge(patch, change)
        yield {column: value for column, value, _ in cell}, patch


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _fits(parent: Planned, group: Group, columns: Row) -> bool:
    same = all(parent.columns.get(name, columns.get(name)) == columns.get(name) for name in group.match)
    return same and bool(matching([parent.columns], group.where))


def _inherited(parent: Planned, group: Group) -> Row:
    own = {f"{parent.group}_{name}": value for name, value in parent.own.items() if name not in group.match}
    return parent.inherited | own


@cache
def _parameters(size: str, vocab_size: int, context: int) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    from holdfast.lab.architecture import architecture, counted_parameters
    from holdfast.lab.config import SizeConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture(SizeConfig.model_validate_json(size), vocab_size, context)
        )
    return counted_parameters(model)


def _cost(group: str, runs: list[tuple[int, float | None]]) -> Cost:
    sizes = [size for size, _ in runs]
    known = [(size, tokens) for size, tokens in runs if tokens is not None]
    bounded = len(known) == len(runs)
    tokens = round(sum(tokens for _, tokens in known)) if bounded else None
    flops = sum(6.0 * size * tokens for size, tokens in known) if bounded else None
    return Cost(group, len(runs), (min(sizes), max(sizes)), tokens, flops)


def _regressions(config: RegressionConfig, seeds: Sequence[int], progress: Progress) -> tuple[list[Row], list[Row]]:
    import torch

    from holdfast.lab.regression import experiment

    torch.set_num_threads(1)
    results: list[Row] = []
    curves: list[Row] = []
    for seed in seeds:
        progress.line(f"regression, seed {seed}")
        rows, lines = experiment(config, seed)
        results += [{"seed": seed} | row for row in rows]
        curves += [{"seed": seed} | line for line in lines]
    return results, curves


def _work_off(
    runs: list[Planned], experiment: Experiment, files: Files, cache: Path, processes: int, progress: Progress
) -> None:
    """Do the runs that are not done, each when the one that it goes on from is."""
    done = {run.key for run in runs if run.is_done(cache)}
    left = {run.key: run for run in runs if run.key not in done}
    asked = set(left)

    def job(run: Planned) -> tuple[Any, ...]:
        return resolve(run, files, cache), experiment.data.model_dump(), {k: str(v) for k, v in files.items()}

    def finished(run: Planned, row: dict[str, Any]) -> None:
        done.add(run.key)
        losses = ", ".join(f"{name} {at['loss']:.3f}" for name, at in row["end"]["domains"].items())
        cost = f"{row['tokens']:,} tokens, {row['seconds']:.0f} s"
        progress.line(f"{len(done & asked)}/{len(asked)} {run.name}: {losses} after {cost}")

    ready = lambda run: run.parent is None or run.parent.key in done  # noqa: E731
    if processes == 1:
        while left:
            run = left.pop(next(key for key, run in left.items() if ready(run)))
            finished(run, _do(*job(run)))
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        working: dict[Future[dict[str, Any]], Planned] = {}
        try:
            while left or working:
                for key in [key for key, run in left.items() if ready(run)][: processes - len(working)]:
                    run = left.pop(key)
                    working[pool.submit(_do, *job(run))] = run
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    finished(working.pop(future), future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _do(config: dict[str, Any], data: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """One run in one thread, and what is measured of its model; another process may be at the same run."""
    import torch

    from holdfast.lab.pretrain import pretrain
    from holdfast.quiet import quieten

    quieten()
    torch.set_num_threads(1)
    folder = Path(config["output"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        result = pretrain(config, Progress(quiet=True))
        if not (folder / DONE).exists():
            kind = data_of(Named(**data), "experiment")
            measured = kind.measures(folder / "model", {name: Path(path) for name, path in files.items()})
            write_json(folder / DONE, measured)
    return result
