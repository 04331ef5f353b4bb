"""A sweep: runs that differ by a grid, described by one YAML file, each checked before the first one starts."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from holdfast.config.reading import load, read_yaml, set_key
from holdfast.config.run import RunConfig, load_config
from holdfast.config.section import Section, Seed, Share
from holdfast.data.load import find_source
from holdfast.errors import ConfigError, UserError
from holdfast.records.shapes import read_json
from holdfast.sweep.grid import Axis, Grid, cells

LONGEST_VALUE = 48
"""Letters of a value in a run's name; a longer value is cut and gets a digest."""


class Resources(Section):
    """The resources of one run."""

    processes: int = Field(1, ge=1, description="processes that train a run together, each with a GPU where there are")
    cores: float = Field(1, ge=0, description="of a machine of Ray's, for each process")
    gpus: float = Field(0, ge=0, description="of a machine of Ray's, for each process")
    retries: int = Field(
        3, ge=-1, description="how often Ray starts a run again whose machine was lost; -1: however often"
    )


class Range(Section):
    """The range in which a value is searched."""

    low: float = Field(description="the least value")
    high: float = Field(description="the greatest value")
    log: bool = Field(True, description="whether its logarithm is what is spread evenly")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 where log is true")
        return self


class SearchConfig(Section):
    """A search on the tasks' dev splits: the best average among values that keep forgetting within a limit."""

    over: dict[str, Range] = Field(min_length=1, description="dotted keys, for example method.strength")
    max_forgetting: Share = Field(description="forgetting at most, a fraction or a share such as 5%")
    trials: int = Field(20, ge=1, description="values tried for each cell of the grid, whatever its seeds")
    at_once: int = Field(1, ge=1, description="trials that are chosen before the result of any of them is known")
    seed: Seed = Field(0, description="of the sampler (Optuna's TPE)")


def _run(value: Any) -> Any:
    """The run's configuration; a file's own output is that of a single run."""
    if not isinstance(value, str):
        return value
    return {key: part for key, part in read_yaml(Path(value)).items() if key != "output"}


class Sweep(Section):
    """Runs below one folder."""

    output: str = Field(description="folder of the runs, their table and their report")
    run: Annotated[dict[str, Any], BeforeValidator(_run)] = Field(
        description="configuration of every run, or the YAML file that holds it, whose output is not used"
    )
    grid: Grid | list[Grid] = Field(
        default_factory=dict,
        description="columns: a dotted key with its values, or a name with what each of its named values changes "
        "({dotted key: value}); of several grids, the runs of all",
    )
    search: SearchConfig | None = Field(None, description="values that are searched before the runs")
    resources: Resources = Field(Resources(), description="what one run needs")
    published: str | None = Field(
        None, description="CSV file, beside this one, of published figures that the runs are compared with"
    )

    @model_validator(mode="after")
    def _no_output(self) -> Sweep:
        if "output" in self.run:
            raise ValueError("run.output: the sweep gives each run a folder of its own below its output; leave it out")
        return self


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: of its folder; it depends on the run's own values only.
        columns: the values by which it differs from other runs.
        config: as ``holdfast run`` would read it.
    """

    name: str
    columns: dict[str, Any]
    config: RunConfig

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.config.output)

    @property
    def state(self) -> str:
        """done, begun or new."""
        if not (self.path / "run.json").exists():
            return "new"
        return "done" if is_done(self.config, self.path) else "begun"


def is_done(config: RunConfig, path: Path) -> bool:
    """Whether the run in a directory is finished, and its stream has not grown since."""
    record = read_json(path / "run.json")
    if record.get("finished") is None:
        return False
    return len(find_source(config.stream).tasks) <= len(record["tasks"])


def load_sweep(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Sweep:
    """Read a sweep: a YAML file or the mapping that it holds, with ``key.path=value`` changes.

    A file may name another file as its ``base``. Then its ``run`` holds changes to the base's run ({dotted key:
    value}), its ``grid`` replaces or adds columns (or, where one of the two is a list of grids, replaces the base's),
    and its other keys replace those of the base.

    Raises:
        ConfigError: a key is unknown, missing or wrong; the message names it and a near name.
    """
    where = "the sweep" if isinstance(source, dict) else str(source)
    values = dict(source) if isinstance(source, dict) else _read(Path(source))
    if any(change.startswith("run.") for change in overrides or []):
        values["run"] = _run(values.get("run"))  # a file's keys can be changed as those of a section
    sweep: Sweep = load(Sweep, values, overrides, where)
    return sweep


def is_sweep(path: Path) -> bool:
    """Whether a YAML file describes a sweep, not a run."""
    return not {"run", "base", "grid"}.isdisjoint(read_yaml(path))


def _read(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if isinstance(values.get("published"), str):
        values["published"] = str(path.parent / values["published"])
    if "base" not in values:
        return values
    below = _read(path.parent / str(values.pop("base")))
    changes, grids = values.pop("run", {}), [below.get("grid", {}), values.get("grid", {})]
    if not isinstance(below.get("run"), dict) or not isinstance(changes, dict):
        raise ConfigError(f"{path}: base: run of a sweep with a base, and of its base, must be mappings")
    for key, value in changes.items():
        set_key(below["run"], key, value)
    if all(isinstance(grid, dict) for grid in grids):
        values["grid"] = grids[0] | grids[1]
    return below | values


def expand(sweep: Sweep, folder: Path | None = None) -> list[PlannedRun]:
    """Every run, in the order of the grid; a key that is searched has the middle of its range.

    Args:
        folder: of the runs; None: the sweep's output.

    Raises:
        ConfigError: a run's configuration is wrong, or two runs have one name.
    """
    grids = sweep.grid if isinstance(sweep.grid, list) else [sweep.grid]
    runs = [planned(sweep, axes, {}, folder) for grid in grids for axes in cells(grid)]
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise ConfigError(
                f"grid: {count} runs are called {name!r}; leave one out, or name the values: "
                "{column: {NAME: changes}}"
            )
    return runs


def planned(sweep: Sweep, axes: Sequence[Axis], searched: dict[str, float], folder: Path | None = None) -> PlannedRun:
    """The run of one cell.

    Args:
        searched: the values that the search chose, {dotted key: value}.
        folder: of the run's folder; None: the sweep's output.

    Raises:
        ConfigError: its configuration is wrong.
    """
    axes = [*axes, *(Axis(key.rpartition(".")[2], value, {key: value}) for key, value in searched.items())]
    parts = ",".join(f"{axis.column}={shown(axis.value)}" for axis in axes)
    name = re.sub(r"[^\w.,=+-]+", "-", parts).replace("/", "-") or "run"
    values = copy.deepcopy(sweep.run)
    try:
        for key, range_ in (sweep.search.over if sweep.search else {}).items():
            set_key(values, key, (range_.low * range_.high) ** 0.5 if range_.log else (range_.low + range_.high) / 2)
        for axis in axes:
            for key, value in axis.changes.items():
                set_key(values, key, copy.deepcopy(value))
        config = load_config(values | {"output": str((folder or Path(sweep.output)) / name)})
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return PlannedRun(name, {axis.column: axis.value for axis in axes}, config)


def shown(value: Any) -> str:
    """A value as a part of a file's name: a section as its name and options, a path as its last part."""
    if isinstance(value, dict):
        options = [f"{key}-{shown(below)}" for key, below in value.items() if key != "name"]
        text = "-".join([*([str(value["name"])] if "name" in value else []), *options])
    elif isinstance(value, list):
        text = "+".join(shown(below) for below in value)
    elif isinstance(value, str):
        text = value.rstrip("/").rpartition("/")[2]
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = json.dumps(value)
    if len(text) > LONGEST_VALUE:
        text = f"{text[: LONGEST_VALUE - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def check(runs: Sequence[PlannedRun]) -> None:
    """Check that each run can start or continue, as ``holdfast check`` does; runs that differ only in the seed, once.

    Raises:
        UserError: a run cannot; the message names it.
    """
    from holdfast.runner.names import check_names

    for run in runs:
        with _naming(run):
            check_names(run.config)

    from holdfast.records.directory import RunDirectory
    from holdfast.runner.begun import as_begun
    from holdfast.runner.setup import check_growth, prepare, resolve

    seen = set()
    for run in runs:
        with _naming(run):
            directory = RunDirectory(run.path)
            resolved = resolve(as_begun(run.config, directory.record))
            directory.check_config(resolved.config)
            if run.state == "done":
                directory.appended(resolved.config, list(directory.record["tasks"]))
            key = run.config.model_copy(update={"seed": 0, "output": ""}).model_dump_json()
            if key not in seen or run.state == "begun":
                check_growth(prepare(resolved, past=directory.past(), begins=not directory.record), directory)
                seen.add(key)


@contextmanager
def _naming(run: PlannedRun) -> Iterator[None]:
    """Put the name of the run before an error's message."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{run.name}: {error}") from None
