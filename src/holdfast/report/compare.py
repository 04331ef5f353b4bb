"""Runs side by side: grouped over seeds, checked for whether they can be compared, ranked, and paired."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.config.describe import free_keys
from holdfast.config.evaluation import GeneralConfig
from holdfast.config.run import RunConfig
from holdfast.errors import ConfigError, did_you_mean
from holdfast.metrics.seeds import holm, mean_interval, seed_difference, seed_intervals
from holdfast.records.read import FinishedRun, name_runs, read_runs, settings
from holdfast.report.figures import COMPARED, COSTS, SHIFT, Figure, direction
from holdfast.report.text import shorten


@dataclass
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: what they are called together.
    """

    label: str
    runs: list[FinishedRun]

    @property
    def seeds(self) -> list[int]:
        return [run.info["seed"] for run in self.runs]

    @property
    def reference(self) -> str | None:
        """Why the group competes with nobody, where it does not."""
        return self.runs[0].reference

    @property
    def general(self) -> dict[str, tuple[float | None, float | None]]:
        """Each general ability before training and at the end, means over the runs."""
        names = dict.fromkeys(name for run in self.runs for name in run.matrix["general"])
        columns = {name: [run.matrix["general"].get(name, [None]) for run in self.runs] for name in names}
        return {
            name: (_mean([values[0] for values in column]), _mean([values[-1] for values in column]))
            for name, column in columns.items()
        }

    @property
    def at_chance(self) -> list[str]:
        """The general abilities that stood at chance before training in every run that tells."""
        told = [run.matrix["chance"] for run in self.runs if run.matrix.get("chance")]
        names = dict.fromkeys(name for chance in told for name in chance)
        return [name for name in names if all(chance[name]["at_chance"] for chance in told if name in chance)]

    @property
    def gate(self) -> str | None:
        """What the gates of the runs said, in words; None where there was none."""
        decisions = [decision for run in self.runs for decision in run.info.get("gate", [])]
        failed = sum(not decision["passed"] for decision in decisions)
        return f"{failed} of {len(decisions)} stages failed" if decisions else None

    @property
    def not_learned(self) -> list[str]:
        """Tasks that at least one run of the group did not learn."""
        return list(dict.fromkeys(task for run in self.runs for task in run.not_learned))

    def values(self, key: str) -> list[float | None]:
        """A figure or cost of each run."""
        return [run.figure(key) for run in self.runs]


def grouped(runs: Sequence[FinishedRun]) -> list[Group]:
    """The runs by what they are but for their seed, in the order in which they first come.

    Two runs of one seed stand in groups of their own: together they would count as two seeds.
    """
    unimportant = {"seed", *free_keys(RunConfig)}
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        data = [task["fingerprint"] for task in run.info["tasks"].values()]
        config = {k: v for k, v in settings(run).items() if k not in unimportant}
        by_stage = {k: v for k in run.stage_settings[0] if isinstance(v := run.setting(k), list)}
        key = json.dumps([config, data, by_stage], sort_keys=True)
        if run.info["seed"] in (other.info["seed"] for other in groups.get(key, [])):
            key += str(run.path)
        groups.setdefault(key, []).append(run)
    names = name_runs([members[0] for members in groups.values()], unimportant)
    return [Group(name, members) for name, members in zip(names, groups.values(), strict=True)]


def differences(runs: Sequence[FinishedRun]) -> list[str]:
    """Why runs cannot be compared: one line each for what differs in their streams, prompts, budgets and metrics, and
    for runs that are there twice; empty where nothing does."""
    lines = []
    for what, facts in (("streams", _stream), ("prompts", _prompts), ("budgets", _budget), ("metrics", _metrics)):
        known = [(run, facts(run)) for run in runs]
        for key in dict.fromkeys(key for _, found in known for key in found):
            having: dict[str, list[FinishedRun]] = {}
            for run, found in known:
                if key in found:
                    having.setdefault(json.dumps(found[key], ensure_ascii=False), []).append(run)
            if len(having) > 1:
                shown = "; ".join(f"{shorten(value, 90)} in {_paths(those)}" for value, those in having.items())
                lines.append(f"{what} differ: {key}: {shown}")
    return lines + _twice(runs)


def refuse_different(runs: Sequence[FinishedRun]) -> None:
    """ConfigError if the runs cannot be compared; it says why."""
    lines = differences(runs)
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"these runs cannot be compared:{listed}\nleave some out, or give --allow-different")


@dataclass
class Comparison:
    """Groups of runs side by side.

    Attributes:
        rows: one a group, with ``run`` (its label), ``directories``, ``seeds``, the figures, costs and shift by key
            (means over the seeds, of memory the most; None where one is not known), ``intervals`` ({figure: [low,
            high]}), ``reference`` (why it competes with nobody, or None), ``best`` (keys for which it is the best),
            ``rank`` (by average, from 1, or None), ``difference`` (to the baseline, of
            :func:`holdfast.metrics.seed_difference` at the end of the run, with ``paired``, whether by seed, and
            ``p_holm``, corrected for the number of comparisons; or None), ``general`` ({name: (before training, at the
            end)}), ``at_chance`` (those of them that stood at chance before training), ``gate`` (what it said, in
            words, or None), ``not_learned`` (tasks that a run of it did not learn) and ``split`` (measured on).
        baseline: label of the group with which the others are paired.
        different: why the runs cannot be compared; nobody is best or ranked then.
        lower: whether a lower score is better.
    """

    rows: list[dict[str, Any]]
    baseline: str
    different: list[str]
    lower: bool

    @property
    def figures(self) -> list[Figure]:
        """Those of which something is known."""
        return [figure for figure in COMPARED if any(row[figure.key] is not None for row in self.rows)]


def compare(runs: list[FinishedRun], baseline: str | None = None) -> Comparison:
    """Compare runs, those that differ in their seed alone together.

    Args:
        baseline: label of a group, or a directory in it; where absent, the first group that is no reference.

    Raises:
        ConfigError: there is no group of this label.
    """
    groups = grouped(runs)
    base = _baseline(groups, baseline)
    rows: list[dict[str, Any]] = []
    for group in groups:
        means = {figure.key: _mean(group.values(figure.key)) for figure in (*COMPARED, *COSTS, SHIFT)}
        most = [value for value in group.values("peak_memory_gib") if value is not None]
        rows.append(
            {"run": group.label, "directories": [str(run.path) for run in group.runs], "seeds": group.seeds}
            | means
            | {"peak_memory_gib": max(most, default=None), "intervals": _intervals(group), "reference": group.reference}
            | {"best": [], "rank": None, "difference": None if group is base else _paired(base, group)}
            | {
                "general": group.general,
                "at_chance": group.at_chance,
                "gate": group.gate,
                "not_learned": group.not_learned,
                "unfinished": any(run.info.get("finished") is None for run in group.runs),
                "split": group.runs[0].split,
            }
        )
    _correct(rows)
    comparison = Comparison(rows, base.label, differences(runs), runs[0].lower_is_better(0))
    if not comparison.different:
        _rank(comparison)
    return comparison


def compare_table(paths: list[Path]) -> list[dict[str, Any]]:
    """The rows of the comparison of the runs in these directories.

    Raises:
        RunDirectoryError: a directory holds no run, or none that was evaluated yet.
    """
    return compare(read_runs(paths)).rows


def _rank(comparison: Comparison) -> None:
    """Say which group is best by each figure, where they are not all the same, and number them by average."""
    rows = [row for row in comparison.rows if row["reference"] is None]
    for figure in (*COMPARED, *COSTS):
        values = [row[figure.key] for row in rows if row[figure.key] is not None]
        if len(set(values)) > 1:
            top = max(values) if direction(figure, comparison.lower) == "high" else min(values)
            for row in rows:
                if row[figure.key] == top:
                    row["best"].append(figure.key)
    known = [row for row in rows if row["average"] is not None]
    for row in known if len(rows) > 1 else []:
        better = [other for other in known if (other["average"] < row["average"]) == comparison.lower]
        row["rank"] = 1 + sum(other["average"] != row["average"] for other in better)


def _stream(run: FinishedRun) -> dict[str, Any]:
    rows = {f"rows or instructions of task {task}": run.info["tasks"][task]["fingerprint"][:12] for task in run.tasks}
    return {"tasks": run.tasks, "version": (run.info.get("stream") or {}).get("version")} | rows


def _prompts(run: FinishedRun) -> dict[str, Any]:
    config = settings(run)
    keys = ("data.template", "data.supervise", "evaluation.max_new_tokens")
    return {key: config.get(key) for key in keys} | {"max_length": run.info.get("max_length")}


def _budget(run: FinishedRun) -> dict[str, Any]:
    """Rows in an optimizer step, and how many steps or epochs there are; nothing for a run that trains nothing."""
    if run.untrained:
        return {}
    length = "training.epochs" if run.setting("training.max_steps") is None else "training.max_steps"
    return {
        "training.batch_size": run.setting("training.batch_size"),
        "length of a stage": {length: run.setting(length)},
    }


def _metrics(run: FinishedRun) -> dict[str, Any]:
    general = run.config["evaluation"]["general"]
    keys = ("name", "kind", "rows", "by", "shots", "max_new_tokens")
    defaults = {key: GeneralConfig.model_fields[key].default for key in keys[2:]}
    measures = [[(defaults | measure).get(key) for key in keys] for measure in general or []]
    unimportant = ("split", "batch_size", "bootstrap", "every", "watch_general", "max_new_tokens", "general")
    how = {
        key: value
        for key, value in settings(run).items()
        if key.startswith("evaluation.") and key.split(".")[1] not in unimportant and key not in free_keys(RunConfig)
    }
    named = {f"metric of task {task}": metric for task, metric in run.matrix["metrics"].items()}
    named["evaluation.split"] = run.split
    return named | {"general abilities": list(run.matrix["general"]), "evaluation.general": measures} | how


def _twice(runs: Sequence[FinishedRun]) -> list[str]:
    """Runs that only differ in where they are."""
    seen: dict[str, list[FinishedRun]] = {}
    unimportant = free_keys(RunConfig)
    for run in runs:
        key = json.dumps({k: v for k, v in settings(run).items() if k not in unimportant}, sort_keys=True)
        seen.setdefault(key, []).append(run)
    return [
        f"seeds do not differ: {_paths(those)} are the same but for their directory, and would count as several seeds"
        for those in seen.values()
        if len(those) > 1
    ]


def _paths(runs: Sequence[FinishedRun]) -> str:
    shown = ", ".join(str(run.path) for run in runs[:2])
    return shown if len(runs) <= 2 else f"{shown} and {len(runs) - 2} more"


def _baseline(groups: list[Group], label: str | None) -> Group:
    if label is None:
        return next((group for group in groups if group.reference is None), groups[0])
    for group in groups:
        if label in (group.label, *(str(run.path) for run in group.runs)):
            return group
    raise ConfigError(f"--baseline: no run is called {label!r}{did_you_mean(label, [group.label for group in groups])}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _intervals(group: Group) -> dict[str, list[float] | None]:
    """95 % intervals of the group's figures: of one run over test examples, of several over seeds too."""
    if len(group.runs) == 1:
        return dict(group.runs[0].matrix["intervals"])
    over_seeds = {
        figure.key: mean_interval([v for v in group.values(figure.key) if v is not None])
        for figure in COMPARED
        if None not in group.values(figure.key)
    }
    first = group.runs[0]
    examples = [run.examples(len(run.tasks)) for run in group.runs]
    over_both = seed_intervals(examples, metrics=first.scorers, totals=first.totals)
    return over_seeds | {key: ends for key, ends in over_both.items() if ends is not None}


def _paired(base: Group, group: Group) -> dict[str, Any] | None:
    """The group's scores at the end less those of the baseline; None where they were not taken of the same examples.

    Runs are paired by seed where both groups have the same seeds.
    """
    a, b = _at_the_end(base), _at_the_end(group)
    metrics = base.runs[0].matrix["metrics"], group.runs[0].matrix["metrics"]
    if a is None or b is None or metrics[0] != metrics[1] or group.runs[0].matrix["summary"]["average"] is None:
        return None
    if len({tuple(task.shape for task in run) for run in (*a.values(), *b.values())}) > 1:
        return None
    paired = a.keys() == b.keys() and len(a) == len(base.runs) and len(b) == len(group.runs)
    first = list(a.values())
    second = [b[seed] for seed in a] if paired else list(b.values())
    return seed_difference(first, second, paired=paired, totals=group.runs[0].totals) | {"paired": paired}


def _at_the_end(group: Group) -> dict[int, list[NDArray[np.float64]]] | None:
    """By seed, statistics of each task's test examples after the last stage; None where one is missing."""
    T = len(group.runs[0].tasks)
    ends = {}
    for run in group.runs:
        statistics = [run.statistics(T, j) for j in range(T)]
        ends[run.info["seed"]] = [task for task in statistics if task is not None]
        if len(ends[run.info["seed"]]) < T:
            return None
    return ends


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm``, the p-value corrected for the number of comparisons with the baseline."""
    differences = [row["difference"] for row in rows if row["difference"] is not None]
    for difference, corrected in zip(differences, holm([d["p"] for d in differences]), strict=True):
        difference["p_holm"] = corrected
