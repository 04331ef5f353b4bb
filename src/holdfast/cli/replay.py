"""`holdfast replay`: a corpus that a model writes of itself, and a page that shows what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.company import refuse
from holdfast.system.terminal import say

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|CORPUS", help="Folder or hub name of a model, or an adapter's folder.", show_default=False
    ),
]
Tokens = Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens to write.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write.", show_default=False)]
Length = Annotated[
    int | None,
    typer.Option("--length", min=2, help="Tokens of a sample.", show_default="the model's context, at most 1024"),
]
Domain = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        help="Domain whose token begins a sample; repeat for several in turn.",
        show_default="the begin token",
    ),
]
PromptToken = Annotated[
    int | None, typer.Option("--prompt-token", min=0, help="Number of that token, instead.", show_default=False)
]
Temperature = Annotated[float, typer.Option("--temperature", help="Of the draws.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples drawn together, one shard each time.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Let the model speak for user and assistant in its chat template.",
        show_default="where there is one and no token is named",
    ),
]
EngineName = Annotated[str, typer.Option("--engine", help="transformers, or vllm where it is installed.")]
Inspect = Annotated[bool, typer.Option("--inspect", help="Write a page on a corpus instead.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The page.", show_default="corpus.html in the corpus")
]
Against = Annotated[
    Path | None,
    typer.Option("--against", help="Real text, or a token file, to compare the corpus with.", show_default=False),
]


WRITING = (
    *("tokens", "out", "length", "domain", "prompt_token"),
    *("temperature", "batch_size", "seed", "chat", "engine"),
)
"""Parameters of a corpus that is written."""


def replay(
    context: typer.Context,
    model: Model,
    tokens: Tokens = None,
    out: Out = None,
    length: Length = None,
    domain: Domain = None,
    prompt_token: PromptToken = None,
    temperature: Temperature = 1.0,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    chat: Chat = None,
    engine: EngineName = "transformers",
    inspect: Inspect = False,
    output: Output = None,
    against: Against = None,
) -> None:
    """Let a model write a corpus of itself, to rehearse later: `path` of a method with source self.

    The same command continues a corpus that was stopped or killed, and ends with the same files. With --inspect, look
    at one: lengths, tokens, loss under the model, repetition, overlap and a few samples, as one page.
    """
    from holdfast.errors import ConfigError
    from holdfast.system.quiet import silence_libraries

    if not inspect:
        refuse(context, "is about the page of a corpus; give --inspect, too", "output", "against")
        if tokens is None or out is None:
            raise ConfigError("replay: give --tokens and --out, or --inspect to look at a corpus")
        silence_libraries()
        from holdfast.rehearsal.replay import replay as write_corpus
        from holdfast.rehearsal.request import SampleOptions
        from holdfast.system.progress import Progress

        with Progress().bar(f"replay {model}") as bar:
            manifest = write_corpus(
                model,
                out,
                SampleOptions(length, domain or None, prompt_token, chat, temperature),
                tokens=tokens,
                batch_size=batch_size,
                seed=seed,
                engine=engine,
                on_progress=lambda done, total: bar.update(done, total=total),
            )
        say(
            f"{out}: {manifest['samples']:,} samples, {manifest['tokens']:,} tokens, {manifest['duplicates']:,} "
            f"duplicates left out, {-manifest['log_prob'] / manifest['supervised']:.3f} nats per token"
        )
        return
    refuse(context, "is about a corpus to write, and --inspect writes none", *WRITING)
    silence_libraries()
    from holdfast.report.corpus import write_corpus_page

    say(write_corpus_page(Path(model), output or Path(model, "corpus.html"), against))
