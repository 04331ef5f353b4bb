"""Search for values, such as a method's strength, by Optuna's TPE on dev splits: the best average within a limit on
forgetting.

The order of the trials depends on the sweep only, so a search that was stopped continues with the same trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, GateFailed
from holdfast.sweep.grid import Axis, cells
from holdfast.sweep.plan import PlannedRun, Range, SearchConfig, Sweep, check, planned
from holdfast.sweep.work import Workers, in_a_line, work_off
from holdfast.system.files import write_json
from holdfast.system.progress import Progress


def searched(sweep: Sweep, workers: Workers, progress: Progress) -> list[PlannedRun]:
    """Search once for each cell of the grid, over all its seeds, and plan its runs with the best values.

    Writes search.json: for each cell its trials and the best values.

    Raises:
        ConfigError: Optuna is not installed.
        UserError: a trial cannot be run, for example because a task has no dev split.
        GateFailed: no trial of a cell kept to the limit.
    """
    assert sweep.search is not None
    grids = sweep.grid if isinstance(sweep.grid, list) else [sweep.grid]
    runs: list[PlannedRun] = []
    chosen: dict[str, dict[str, float]] = {}
    searches: list[dict[str, Any]] = []
    for grid in grids:
        for axes in cells(grid):
            without_seed = [axis for axis in axes if set(axis.changes) != {"seed"}]
            name = planned(sweep, without_seed, {}).name
            if name not in chosen:
                trials = _search(sweep, sweep.search, without_seed, name, workers, progress)
                chosen[name] = best(trials, sweep.search, name)
                searches.append({"cell": name, "best": chosen[name], "trials": trials})
                write_json(Path(sweep.output) / "search.json", searches)
            runs.append(planned(sweep, axes, chosen[name]))
    check(runs)
    return runs


def best(trials: Sequence[dict[str, Any]], search: SearchConfig, name: str) -> dict[str, float]:
    """The values of the trial with the best average among those within the limit; of equal ones, the first.

    Args:
        trials: with ``values``, ``average``, ``forgetting`` and ``lower`` (whether a lower average is better); a trial
            that failed has an average of None.

    Raises:
        GateFailed: no trial is within the limit.
    """
    done = [trial for trial in trials if trial["average"] is not None]
    allowed = [trial for trial in done if trial["forgetting"] <= search.max_forgetting]
    if not allowed:
        least = f"; the least was {min(t['forgetting'] for t in done):.3f}" if done else "; all trials failed"
        raise GateFailed(f"search: {name}: no trial kept forgetting at most {search.max_forgetting:g}{least}")
    values: dict[str, float] = max(allowed, key=lambda t: -t["average"] if t["lower"] else t["average"])["values"]
    return values


def _search(
    sweep: Sweep, search: SearchConfig, axes: Sequence[Axis], name: str, workers: Workers, progress: Progress
) -> list[dict[str, Any]]:
    """The trials of one cell."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("search: needs Optuna: pip install 'holdfast[search]'") from None
    from holdfast.records.read import read_run

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dev = Axis("split", "dev", {"evaluation.split": "dev"})
    trials: list[dict[str, Any]] = []
    sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=min(10, max(1, search.trials // 3)))
    study = optuna.create_study(sampler=sampler)
    while len(trials) < search.trials:
        suggested = [study.ask() for _ in range(min(search.at_once, search.trials - len(trials)))]
        chosen = [{key: _suggest(trial, key, range_) for key, range_ in search.over.items()} for trial in suggested]
        runs = [planned(sweep, [*axes, dev], values, Path(sweep.output) / "search" / name) for values in chosen]
        check(runs)
        for trial, values, end in zip(suggested, chosen, work_off(runs, workers, progress), strict=True):
            summary: dict[str, Any] = {"average": None, "forgetting": None}
            lower = False
            if end.state in ("done", "skipped"):
                run = read_run(end.run.path)
                lower = run.lower_is_better(0)
                summary = {key: run.matrix["summary"][key] for key in summary}
            trials.append({"run": end.run.name, "values": values, "lower": lower} | summary)
            if None in summary.values():
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                progress.line(f"search {name}: {end.run.name}: {in_a_line(end)}")
                continue
            trial.set_constraint("forgetting", summary["forgetting"] - search.max_forgetting)
            study.tell(trial, summary["average"] if lower else -summary["average"])
            progress.line(
                f"search {name}, trial {len(trials)} of {search.trials}: {end.run.name}: "
                f"average {summary['average']:.3f}, forgetting {summary['forgetting']:.3f}"
            )
    return trials


def _suggest(trial: Any, key: str, range_: Range) -> float:
    """A value of a range, rounded to four digits, which a run's name can hold."""
    return float(f"{trial.suggest_float(key, range_.low, range_.high, log=range_.log):.4g}")
