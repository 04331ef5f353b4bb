"""Doing an experiment: its runs, in an order and in processes, then its tables, figure and findings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from holdfast.config import Named, load_config
from holdfast.files import read_json, read_jsonl, write_json, write_text
from holdfast.lab.derived import above_front, compute_multiplier, loss_at_matched
from holdfast.lab.experiment import DONE, Experiment, Planned, expand, resolve
from holdfast.lab.findings import judge, markdown
from holdfast.lab.regression import RegressionConfig
from holdfast.lab.sources import Files, data_of, digest
from holdfast.lab.tables import Row, read_table, write_table
from holdfast.pool import Pool
from holdfast.progress import Progress

RESULTS, CURVES = "results.csv", "curves.csv"


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
        out: gets results.csv, curves.csv where asked for, figure.pdf, figure.png, findings.json and findings.md.
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
    curves: list[Row] = []
    if experiment.slices_of is not None:
        results = read_table(out.parents[2] / experiment.slices_of / "results" / out.name / RESULTS)
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
    write_table(out / RESULTS, results)
    if curves:
        write_table(out / CURVES, curves)
    return redraw(experiment, out)


def redraw(experiment: Experiment, out: Path) -> list[dict[str, Any]]:
    """Make figure and findings from the tables that are in ``out``.

    Raises:
        DataError: there is no table.
    """
    from holdfast.lab.figures import Tables, draw

    results = read_table(out / RESULTS)
    curves = read_table(out / CURVES) if (out / CURVES).exists() else []
    draw(experiment.figure, Tables(results, curves, experiment.old, experiment.new), out / "figure")
    findings = [judge(finding, results) for finding in experiment.findings]
    write_json(out / "findings.json", findings)
    write_text(out / "findings.md", markdown(findings))
    return findings


def tables(experiment: Experiment, runs: Sequence[Planned], cache: Path) -> tuple[list[Row], list[Row]]:
    """A row a run and, where the experiment asks for curves, a row an evaluation, of runs that are done.

    Of each domain ``DOMAIN_start``, ``DOMAIN_loss`` (at the end) and ``DOMAIN_kl``, in nats a token. Of a run that goes
    on from another: ``forgetting``, the rise of the old domain's loss; ``learned``, the fall of the new one's;
    ``forgetting_matched``, that rise where the new domain's loss came to ``matched``; ``compute_multiplier``, over the
    evaluations of the run that it goes on from; ``above_front``, over the front of its seed.
    """
    results: list[Row] = []
    curves: list[Row] = []
    for run in runs:
        folder = run.folder(cache)
        columns = {"group": run.group, **run.columns, "seed": run.seed, "run": run.key}
        if run.command == "run":
            results.append(columns | _scores(read_json(folder / "matrix.json")) | read_json(folder / DONE))
            continue
        result, evaluations = read_json(folder / "result.json"), read_jsonl(folder / "evaluations.jsonl")
        losses = _losses(evaluations)
        row = columns | {key: result[key] for key in ("parameters", "tokens", "seconds", "stop")}
        for name, values in losses.items():
            kl = evaluations[-1]["domains"][name]["kl"]
            row |= {f"{name}_start": values[0], f"{name}_loss": values[-1], f"{name}_kl": kl}
        if run.parent is not None and experiment.old in losses and experiment.new in losses:
            before = read_jsonl(run.parent.folder(cache) / "evaluations.jsonl")
            row |= _changes(experiment, losses[experiment.old], losses[experiment.new], before)
        results.append(row | read_json(folder / DONE))
        for i, evaluation in enumerate(evaluations if experiment.curves else []):
            at = {key: evaluation[key] for key in ("step", "tokens", "seconds")}
            curves.append(columns | at | {f"{name}_loss": values[i] for name, values in losses.items()})
    if experiment.front is not None:
        _measure_over_front(results, experiment.front, f"{experiment.new}_loss", f"{experiment.old}_loss")
    return results, curves


def _losses(evaluations: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The loss of each domain at each evaluation."""
    return {name: [e["domains"][name]["loss"] for e in evaluations] for name in evaluations[0]["domains"]}


def _changes(experiment: Experiment, old: list[float], new: list[float], before: list[dict[str, Any]]) -> Row:
    row: Row = {"forgetting": old[-1] - old[0], "learned": new[0] - new[-1]}
    if experiment.matched is not None:
        matched = loss_at_matched(new, old, experiment.matched)
        row["forgetting_matched"] = None if matched is None else matched - old[0]
    pretraining = _losses(before)
    if experiment.old in pretraining:
        tokens = [evaluation["tokens"] for evaluation in before]
        row["compute_multiplier"] = compute_multiplier(tokens, pretraining[experiment.old], old[-1])
    return row


def _measure_over_front(results: list[Row], group: str, new: str, old: str) -> None:
    for row in results:
        front = [(at[new], at[old]) for at in results if at["group"] == group and at["seed"] == row["seed"]]
        if row["group"] != group and len(front) > 1:
            row["above_front"] = above_front(front, (row[new], row[old]))


def _scores(matrix: dict[str, Any]) -> Row:
    """Of a run of one stage, before and after: losses as of a laboratory run, other scores ``NAME_start`` and ``NAME``.

    ``choices_start``, ``choices`` and ``choices_lost``, the first less the second, are means over all multiple choice.
    """
    columns: Row = {}
    for name, start, end in zip(matrix["tasks"], *matrix["scores"], strict=True):
        columns |= {f"{name}_start": start, f"{name}_loss" if matrix["metrics"][name] == "loss" else name: end}
    shares = []
    for name, (start, end) in matrix["general"].items():
        measure = name.removeprefix("perplexity/")
        if measure != name:
            columns |= {f"{measure}_start": math.log(start), f"{measure}_loss": math.log(end)}
        else:
            columns |= {f"{measure}_start": start, measure: end}
            shares.append((start, end))
    if shares:
        start, end = (sum(values) / len(shares) for values in zip(*shares, strict=True))
        columns |= {"choices_start": start, "choices": end, "choices_lost": start - end}
    return columns


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
        if not curves:  # one seed is enough to be drawn
            curves = [{"seed": seed} | line for line in lines]
    return results, curves


def _work_off(
    runs: list[Planned], experiment: Experiment, files: Files, cache: Path, processes: int, progress: Progress
) -> None:
    """Do the runs that are not done, each when the one that it goes on from is."""
    done = {run.key for run in runs if run.is_done(cache)}
    left = {run.key: run for run in runs if run.key not in done}
    asked = set(left)

    def job(run: Planned) -> tuple[Any, ...]:
        paths = {name: str(path) for name, path in files.items()}
        return run.command, resolve(run, files, cache), run.model(cache), experiment.data.model_dump(), paths

    def finished(run: Planned, said: str) -> None:
        done.add(run.key)
        progress.line(f"{len(done & asked)}/{len(asked)} {run.name}: {said}")

    ready = lambda run: run.parent is None or run.parent.key in done  # noqa: E731
    if processes == 1:
        while left:
            run = left.pop(next(key for key, run in left.items() if ready(run)))
            finished(run, _do(*job(run)))
        return
    with Pool(_do, [{}] * processes) as pool:
        while left or pool.working:
            for key in [key for key, run in left.items() if ready(run)][: pool.free]:
                run = left.pop(key)
                pool.submit(run, *job(run))
            for run, outcome in pool.wait():
                finished(run, outcome.result())


def _do(command: str, config: dict[str, Any], model: Path, data: dict[str, Any], files: dict[str, str]) -> str:
    """One run in one thread, and what is measured of its model; another process may be at the same run.

    Returns:
        what it came to, in words.
    """
    import torch

    from holdfast.lab.pretrain import pretrain
    from holdfast.quiet import quieten
    from holdfast.runner import run

    quieten()
    torch.set_num_threads(1)
    folder, quiet = Path(config["output"]), Progress(quiet=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if command == "run":
            columns = _scores(run(load_config(config), quiet))
            said = ", ".join(f"{name} {value:.3f}" for name, value in columns.items())
        else:
            result = pretrain(config, quiet)
            losses = ", ".join(f"{name} {at['loss']:.3f}" for name, at in result["end"]["domains"].items())
            said = f"{losses} after {result['tokens']:,} tokens, {result['seconds']:.0f} s"
        if not (folder / DONE).exists():
            kind = data_of(Named(**data), "experiment")
            measured = kind.measures(model, {name: Path(path) for name, path in files.items()})
            write_json(folder / DONE, measured)
    return said
