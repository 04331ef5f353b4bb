"""An experiment: a grid of runs described by one YAML file, checked and counted before anything is run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from holdfast.config.reading import load
from holdfast.config.section import Named, Section, as_named
from holdfast.errors import ConfigError, did_you_mean
from holdfast.lab.findings import Finding, matching
from holdfast.lab.regression import RegressionConfig
from holdfast.lab.sources import Data, Files, digest
from holdfast.lab.tables import TableRow
from holdfast.records.directory import slug
from holdfast.sweep.grid import Grid, cells

PACKAGED = Path(__file__).parent / "experiments"  # in an installed package
CHECKOUT = Path(__file__).parents[3] / "experiments" / "lab"
HERE = Path("experiments", "lab")
DONE = "done.json"  # written last into a run's folder: what was measured of its model, beside the losses


class Group(Section):
    """Runs that differ by a grid: pretraining, or what goes on from another group's models."""

    origin: str | None = Field(None, alias="from", description="the group whose models these runs go on from")
    where: dict[str, Any] = Field(default_factory=dict, description="columns and values of the models to go on from")
    match: list[str] = Field(
        default_factory=list, description="columns of the grid in which a run equals the run that it goes on from"
    )
    command: Literal["pretrain", "run"] = Field(
        "pretrain", description="what is run: `holdfast lab pretrain`, or `holdfast run` on a stream of tasks"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="keys of the run; of a laboratory run, over those of `common`"
    )
    grid: Grid = Field(
        default_factory=dict,
        description="columns: a dotted key with its values, or a name with what each of its values changes",
    )


class Experiment(Section):
    """What is run, at which seeds, and which claims it decides."""

    title: str = Field(description="the question, in one line")
    data: Annotated[Named, BeforeValidator(as_named)] = Field(
        Named(name="languages"),
        description="what the runs read: languages, texts, arithmetic, chats or verilog, with options",
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="every run is done with each")
    common: dict[str, Any] = Field(default_factory=dict, description="keys of every laboratory run")
    runs: dict[str, Group] = Field(default_factory=dict, description="groups of runs, each after those it goes on from")
    regression: RegressionConfig | None = Field(None, description="instead of runs: regression in one dimension")
    slices_of: str | None = Field(None, description="instead of runs: the experiment whose table this one looks at")
    old: str | None = Field(None, description="the domain of pretraining, which may be forgotten")
    new: str | None = Field(None, description="the domain of fine-tuning")
    matched: float | None = Field(None, description="loss on the new domain at which forgetting is compared")
    front: str | None = Field(None, description="group whose runs form the front above which others are measured")
    curves: bool = Field(False, description="write curves.csv, a row an evaluation, too")
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
class PlannedLabRun:
    """One run of the grid.

    Attributes:
        varied: the values of its group's grid that it has.
        inherited: those of the runs that it goes on from, under ``GROUP_NAME``.
        config: keys of the run, with ``$NAME`` in place of a token file's path.
        key: a hash of all that its result depends on, so that experiments share the runs that they have in common.
    """

    group: str
    command: str
    varied: TableRow
    inherited: TableRow
    seed: int
    config: dict[str, Any] = field(repr=False)
    parent: PlannedLabRun | None = field(repr=False)
    key: str

    @property
    def columns(self) -> TableRow:
        return self.inherited | self.varied

    @property
    def name(self) -> str:
        values = [f"{column} {value}" for column, value in self.columns.items()]
        return ", ".join([self.group, *values, f"seed {self.seed}"])

    def folder(self, cache: Path) -> Path:
        return cache / "runs" / f"{self.group}-{self.key}"

    def model(self, cache: Path) -> Path:
        """The folder of the model that it ends with."""
        if self.command == "pretrain":
            return self.folder(cache) / "model"
        [task] = self.config["stream"]["tasks"]
        return self.folder(cache) / "stages" / f"01-{slug(task['name'])}" / "model"

    def is_done(self, cache: Path) -> bool:
        return (self.folder(cache) / DONE).exists()


def experiments() -> dict[str, Path]:
    """Folders of the experiments that are known by name, in the order of their names."""
    files = [file for place in (PACKAGED, CHECKOUT, HERE) for file in place.glob("*/*.yaml")]
    return {file.parent.name: file.parent for file in sorted(files, key=lambda file: file.parent.name)}


def find(name: str, scale: str) -> Path:
    """The YAML file of an experiment.

    Args:
        name: of an experiment, or the path of a YAML file.
        scale: tiny or paper; of an experiment that is known by name.

    Raises:
        ConfigError: there is none of this name or scale.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    folders = experiments()
    if name not in folders:
        raise ConfigError(
            f"there is no experiment {name!r}{did_you_mean(name, folders)}; `holdfast lab experiment` lists them, and "
            "a path that ends in .yaml names a file of your own"
        )
    path = folders[name] / f"{scale}.yaml"
    if not path.is_file():
        scales = sorted(file.stem for file in folders[name].glob("*.yaml"))
        raise ConfigError(f"--scale: the experiment {name!r} has no scale {scale!r}; it has {' and '.join(scales)}")
    return path


def results_folder(path: Path, cache: Path) -> Path:
    """Where the results of an experiment go by default: beside its YAML file, or below the cache if that is installed.

    Both end in ``NAME/results/SCALE``, so that slices of an experiment find its table.
    """
    folder = cache / "experiments" / path.parent.name if PACKAGED in path.parents else path.parent
    return folder / "results" / path.stem


def load_experiment(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Experiment:
    """Read an experiment: a YAML file or the mapping that it holds, with ``key.path=value`` changes.

    Raises:
        ConfigError: a key is unknown, missing or wrong; the message names it and a near name.
    """
    experiment: Experiment = load(Experiment, source, overrides)
    return experiment


def expand(experiment: Experiment, data: Data, seeds: Sequence[int] | None = None) -> list[PlannedLabRun]:
    """Every run of the grid, each after the one that it goes on from.

    Raises:
        ConfigError: a group goes on from models that no run makes.
    """
    basis = [experiment.data.name, data.identity()]
    done: dict[str, list[PlannedLabRun]] = {}
    for name, group in experiment.runs.items():
        done[name] = []
        for seed in experiment.seeds if seeds is None else seeds:
            for columns, patch in _cells(group):
                common = experiment.common if group.command == "pretrain" else {}
                config = merge(merge(merge(common, group.config), patch), {"seed": seed})
                parents: list[PlannedLabRun | None] = [None]
                if group.origin is not None:
                    parents = [p for p in done[group.origin] if p.seed == seed and _fits(p, group, columns)]
                    if not parents:
                        raise ConfigError(f"runs.{name}: no run of {group.origin} has {columns | group.where}")
                for parent in parents:
                    inherited = {} if parent is None else _inherited(parent, group)
                    full = config if parent is None else config | {"model": {"path": parent.key}}
                    key = digest([basis, full])
                    done[name].append(PlannedLabRun(name, group.command, columns, inherited, seed, full, parent, key))
    return list(itertools.chain(*done.values()))


def resolve(run: PlannedLabRun, files: Files, cache: Path) -> dict[str, Any]:
    """The run's configuration, with paths in place of names.

    Raises:
        ConfigError: it names a file that the data do not have.
    """

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(below) for key, below in value.items()}
        if isinstance(value, list):
            return [filled(below) for below in value]
        if isinstance(value, str) and value.startswith("$"):
            if value[1:] not in files:
                raise ConfigError(f"{run.name}: there is no {value!r} to read{did_you_mean(value[1:], files)}")
            return str(files[value[1:]])
        return value

    config: dict[str, Any] = filled(run.config)
    if run.parent is not None:
        config["model"] = {"path" if run.command == "pretrain" else "name": str(run.parent.model(cache))}
    return config | {"output": str(run.folder(cache))}


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``below`` with the keys of ``above`` over its own; sections are merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _cells(group: Group) -> Iterator[tuple[TableRow, dict[str, Any]]]:
    """The columns of each cell of a grid, and the keys that it changes."""
    for cell in cells(group.grid):
        patch: dict[str, Any] = {}
        for axis in cell:
            for key, change in axis.changes.items():
                patch = merge(patch, _nested(key, change))
        yield {axis.column: axis.value for axis in cell}, patch


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _fits(parent: PlannedLabRun, group: Group, columns: TableRow) -> bool:
    same = all(parent.columns.get(name, columns.get(name)) == columns.get(name) for name in group.match)
    return same and bool(matching([parent.columns], group.where))


def _inherited(parent: PlannedLabRun, group: Group) -> TableRow:
    varied = {f"{parent.group}_{name}": value for name, value in parent.varied.items() if name not in group.match}
    return parent.inherited | varied
