"""`holdfast lab`: make a tokenizer, token files and a pretrained model from texts, and run whole experiments."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.company import refuse
from holdfast.cli.run import AcceptChanges, Config, HelpWithKeys, Overrides
from holdfast.system.terminal import open_console, say

app = typer.Typer(
    help="Pretrain a small model, and study what drives forgetting.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        show_default=False,
        help=".txt (one document a line), .jsonl, .json, .csv or .parquet, a folder of such files, or a dataset of "
        "Hugging Face.",
    ),
]
Column = Annotated[str, typer.Option("--column", help="Column of a file or dataset that has the text.")]
Subset = Annotated[str | None, typer.Option("--subset", help="Configuration of a dataset.", show_default=False)]
Split = Annotated[str | None, typer.Option("--split", help="Split of a dataset.", show_default="train")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]
TokenizerName = Annotated[
    str, typer.Option("--tokenizer", help="Folder or hub name of a tokenizer.", show_default=False)
]
Domain = Annotated[
    str | None,
    typer.Option("--domain", help="Domain of the documents, whose token begins every row.", show_default=False),
]
Processes = Annotated[int, typer.Option("--processes", min=1, help="Number of processes that tokenise.")]
Documents = Annotated[
    int | None, typer.Option("--documents", min=1, help="Number of documents at most.", show_default="all")
]
Skip = Annotated[int, typer.Option("--skip", min=0, help="Number of documents left out at the start.")]


@app.command("tokenizer")
def tokenizer(
    sources: Sources,
    out: Out,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Tokens at most.")] = 4096,
    domain: Annotated[
        list[str] | None, typer.Option("--domain", help="Name of a domain that gets a token; repeat for more.")
    ] = None,
    reserved: Annotated[int, typer.Option("--reserved", min=0, help="Number of tokens for later use.")] = 0,
    max_length: Annotated[int, typer.Option("--max-length", min=1, help="Context of its models, in tokens.")] = 2048,
    column: Column = "text",
    subset: Subset = None,
    split: Split = None,
) -> None:
    """Train a byte-level BPE tokenizer on texts, and write it as a folder that transformers loads."""
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    from holdfast.data.texts import read_texts
    from holdfast.lab.tokenizer import require_new, train_tokenizer
    from holdfast.system.files import whole_folder

    require_new(out)
    texts = chain.from_iterable([read_texts(name, column=column, subset=subset, split=split) for name in sources])
    trained = train_tokenizer(texts, vocab_size, domains=domain or (), reserved=reserved, model_max_length=max_length)
    with whole_folder(out) as folder:
        trained.save_pretrained(folder)
    if len(trained) < vocab_size:
        say(f"warning: the texts hold no more than {len(trained)} tokens", file=sys.stderr)
    say(f"{out}: {len(trained)} tokens")


@app.command("tokens")
def tokens(
    sources: Sources,
    tokenizer: TokenizerName,
    out: Out,
    domain: Domain = None,
    processes: Processes = 1,
    documents: Documents = None,
    skip: Skip = 0,
    column: Column = "text",
    subset: Subset = None,
    split: Split = None,
) -> None:
    """Tokenise texts into a token file, which pretraining reads; the same command continues a killed build."""
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    from holdfast.config.model import ModelConfig
    from holdfast.data.tokens.file import build_tokens
    from holdfast.models.pretrained import load_tokenizer
    from holdfast.system.progress import Progress

    with Progress().bar("documents") as bar:
        file = build_tokens(
            sources,
            out,
            load_tokenizer(ModelConfig(name=tokenizer), "--tokenizer"),
            domain=domain,
            processes=processes,
            column=column,
            subset=subset,
            split=split,
            skip=skip,
            documents=documents,
            on_progress=lambda done, tokens: bar.update(done, f"{tokens} tokens", total=documents),
        )
    made = file.manifest
    empty = f", {made['empty']} without text passed over" if made["empty"] else ""
    say(f"{out}: {len(file)} tokens ({made['dtype']}) of {made['documents']} documents{empty}")


class HelpWithLabKeys(HelpWithKeys):
    """The keys of a laboratory run."""

    def configuration(self) -> type[Any]:
        from holdfast.lab.config import LabConfig

        return LabConfig


@app.command("pretrain", cls=HelpWithLabKeys)
def pretrain(config: Config, overrides: Overrides = None, accept_changes: AcceptChanges = False) -> None:
    """Train a model from scratch on token files, or go on from one, and measure it before, during and after training.

    The same command continues a run that was stopped or killed, and ends with the same numbers.
    """
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    from holdfast.engines.process import Process
    from holdfast.lab.config import load_lab_config
    from holdfast.lab.pretrain import pretrain as train

    loaded = load_lab_config(config, overrides)
    result = train(loaded, accept_changes=accept_changes)
    if not Process.this().main:
        return
    for name, at in (("before", result["start"]), ("after", result["end"])):
        losses = "  ".join(f"{domain} {measured['loss']:.3f}" for domain, measured in at["domains"].items())
        say(f"{name:6}  {at['tokens']:,} tokens  {losses}".rstrip())
    say(f"stopped by {result['stop']} after {result['step']:,} steps, {result['seconds']:.0f} s: {loaded.output}")


CACHE = Path("runs/lab")
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seeds", help="Instead of the experiment's; repeat for more.", show_default=False),
]
Results = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of tables, figure and findings.", show_default="results/SCALE beside the YAML"),
]


@app.command("experiment")
def experiment(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            help="Of an experiment, or a YAML file of your own; where absent, all are listed.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    scale: Annotated[str, typer.Option("--scale", help="tiny: minutes on two cores; paper: as published.")] = "tiny",
    seeds: Seeds = None,
    out: Results = None,
    cache: Annotated[Path, typer.Option("--cache", help="Folder of data and runs that experiments share.")] = CACHE,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Number of runs at the same time.")] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate every run and count its cost; do nothing.")
    ] = False,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Only make figure and findings anew from the tables.")
    ] = False,
) -> None:
    """Run an experiment of "Forgetting in Language Models", or one of your own: tables, a figure and findings.

    The same command does only the runs that are left, and continues those that were stopped or killed.
    """

    from holdfast.lab import experiment as lab
    from holdfast.lab import work
    from holdfast.lab.count import check_experiment

    if name is None:
        options = ("seeds", "out", "cache", "processes", "dry_run", "redraw")
        refuse(context, "is about an experiment; name one", *options)
        print_experiments(scale, open_console())
        return
    path = lab.find(name, scale)
    loaded = lab.load_experiment(path, overrides)
    folder = out or lab.results_folder(path, cache)
    if dry_run:
        refuse(context, "does nothing with --dry-run", "seeds", "out", "processes", "redraw")
        print_plan(loaded.title, check_experiment(loaded), open_console())
        return
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    if redraw:
        refuse(context, "does nothing with --redraw, which does no run", "seeds", "processes")
        findings = work.redraw(loaded, folder)
    else:
        findings = work.run_experiment(loaded, folder, cache=cache, seeds=seeds, processes=processes)
    print_findings(findings, open_console())
    say(folder)


def print_experiments(scale: str, console: Any) -> None:
    """Name and question of each experiment that is known by name and has this scale."""
    from rich.table import Table

    from holdfast.errors import ConfigError
    from holdfast.lab.experiment import experiments, load_experiment

    table = Table("experiment", "asks")
    for name, folder in experiments().items():
        if (path := folder / f"{scale}.yaml").is_file():
            table.add_row(name, load_experiment(path).title)
    if not table.row_count:
        raise ConfigError(f"--scale: no experiment has a scale {scale!r}; known: tiny, paper")
    console.print(table)


def print_plan(title: str, costs: list[Any], console: Any) -> None:
    """What each group of an experiment would cost."""
    from rich.table import Table

    table = Table("group", "runs", "parameters", "tokens", "FLOPs", title=title)
    for cost in costs:
        least, most = cost.parameters
        size = "" if not least else f"{least:,}" if least == most else f"{least:,} to {most:,}"
        open_end = "until its loss, or its epochs"
        tokens = open_end if cost.tokens is None else f"{cost.tokens:,}"
        table.add_row(cost.group, str(cost.runs), size, tokens, "" if cost.flops is None else f"{cost.flops:.2g}")
    console.print(table)


def print_findings(findings: list[dict[str, Any]], console: Any) -> None:
    """Each claim with its estimate and its verdict."""
    from rich.table import Table

    from holdfast.lab.findings import estimate

    table = Table("claim", "expected", "estimate [95 %]", "seeds", "verdict")
    for judged in findings:
        table.add_row(judged["claim"], judged["expected"], estimate(judged), str(judged["seeds"]), judged["verdict"])
    console.print(table)
