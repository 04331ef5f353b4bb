"""The model card of an export: what the model learned, how and how well, and what the folder lacks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from holdfast.config.section import Named
from holdfast.metrics.summary import summarize
from holdfast.records.read import FinishedRun
from holdfast.report.figures import FIGURES
from holdfast.report.text import NOT_MEASURED, code, in_markdown, interval, number

if TYPE_CHECKING:
    from holdfast.deploy.exported import Exported


def model_card(exported: Exported) -> ModelCard:
    """README.md of an exported folder, with the hub's metadata."""
    parts = [
        _head(exported),
        _lacks(exported),
        _use(exported),
        _training(exported),
        _scores(exported),
        _matrix(exported.run, exported.row),
        _general(exported.run, exported.row),
        _versions(exported.run),
    ]
    text = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{_metadata(exported).to_yaml()}\n---\n\n{text}\n")


def _metadata(exported: Exported) -> ModelCardData:
    """Metadata for the hub. It takes names of the hub only, so the text alone names a local base model or dataset."""
    config = exported.config
    assert config.tuner is not None
    relation = "adapter" if exported.kind == "adapter" else "finetune"
    base: dict[str, Any] = {} if exported.local_base else {"base_model": exported.base, "base_model_relation": relation}
    names = [t.dataset for t in config.stream.tasks or () if t.dataset and not Path(t.dataset).exists()]
    return ModelCardData(
        **base,
        datasets=list(dict.fromkeys(names)) or None,
        library_name="peft" if exported.kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text" if exported.sees else "text-generation",
        tags=list(dict.fromkeys(["holdfast", "continual-learning", *_methods(config.method), config.tuner.name])),
    )


def _methods(methods: Iterable[Named]) -> list[str]:
    return [Path(method.name).stem for method in methods]


def _head(exported: Exported) -> str:
    config, run = exported.config, exported.run
    what = {
        "model": "a whole model",
        "merged": "a whole model, an adapter merged into its base model",
        "adapter": "an adapter",
    }[exported.kind]
    learned = run.tasks if run.joint else run.tasks[: exported.row]
    how = "all at once" if run.joint else "one after another"
    methods = " and ".join(map(code, _methods(config.method)))
    more = "" if exported.row == len(run.tasks) else f" (of {len(run.tasks)} in the run)"
    sees = " It sees: a question may show pictures." if exported.sees else ""
    return (
        f"# {in_markdown(Path(config.model.name).name)}, taught {in_markdown(', '.join(learned))}\n\n"
        f"This is {what}: {code(config.model.name)} after stage {exported.stage} of a continual run of holdfast, in "
        f"which it learned {len(learned)} tasks{more} {how}, with {methods} against forgetting.{sees}"
    )


def _lacks(exported: Exported) -> str:
    if not exported.lacks:
        return ""
    return "## What this folder lacks\n\n" + "\n".join(
        f"- {in_markdown(line[0].upper() + line[1:])}." for line in exported.lacks
    )


def _use(exported: Exported) -> str:
    config = exported.config
    assert config.tuner is not None
    dtype = "" if config.model.dtype == "stored" else f", dtype={_quoted(config.model.dtype)}"
    remote = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    auto = "AutoModelForSeq2SeqLM" if exported.seq2seq else "AutoModelForCausalLM"
    imported = auto
    if exported.sees:
        auto, imported = "AutoModelForImageTextToText", "AutoModelForImageTextToText, AutoProcessor"
    lines = ["## Use", ""]
    if exported.kind == "adapter":
        revision = "" if config.model.revision is None else f", revision={_quoted(config.model.revision)}"
        load = [
            "from peft import PeftModel",
            f"from transformers import {imported}",
            "",
            f"base = {auto}.from_pretrained({_quoted(exported.base)}{revision}{dtype}{remote})",
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    else:
        load = [
            f"from transformers import {imported}",
            "",
            f'model = {auto}.from_pretrained("FOLDER"{dtype}{remote})',
        ]
    opened = ["from PIL import Image"] if exported.sees and not exported.chat else []
    asked = _asked(exported, remote) if exported.sees else []
    lines += ["```python", *opened, *load, *asked, "```", "", *_serve(exported), ""]
    if exported.sees:
        lines.append("Processors of models that read videos, too, need torchvision.")
    if exported.dtype is not None:
        rounded = "" if exported.dtype == "float32" else ", so that answers may differ a little from those scored"
        lines += [f"The adapter was merged in float32; the weights are {exported.dtype}{rounded}.", ""]
    if exported.chat:
        lines.append("Prompts are made by the tokenizer's chat template, which this folder holds.")
    elif exported.seq2seq:
        lines.append(
            "Prompts are plain text, turns joined by newlines: the encoder reads them as the tokenizer makes them, and "
            "the decoder answers."
        )
    else:
        lines.append(
            "Prompts are plain text: turns joined by newlines, and the answer comes after one space. There is no chat "
            "template behind it, so ask for completions, not for chat."
        )
    kept_out = ", and keeps the image token out of answers" if exported.sees else ""
    lines.append(
        f"`generation_config.json` holds the base model's own settings and every token that ends an answer{kept_out}. "
        "The scores below were measured greedily, without the model's own sampling and penalties (`do_sample=False`, "
        "`repetition_penalty=1.0`)."
    )
    return "\n".join(lines)


def _asked(exported: Exported, remote: str) -> list[str]:
    """Lines of Python that ask about a picture."""
    lines = [f'processor = AutoProcessor.from_pretrained("FOLDER"{remote})', ""]
    if exported.chat:
        lines += [
            'content = [{"type": "image", "path": "PICTURE.png"}, {"type": "text", "text": "QUESTION"}]',
            "inputs = processor.apply_chat_template(",
            '    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,',
            '    return_tensors="pt",',
            ")",
        ]
    else:
        lines += [
            'picture = Image.open("PICTURE.png").convert("RGB")',
            'inputs = processor(text=processor.image_token + "QUESTION", images=picture, return_tensors="pt")',
        ]
    return [
        *lines,
        "answer = model.generate(**inputs, max_new_tokens=64, do_sample=False, repetition_penalty=1.0)",
        'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _serve(exported: Exported) -> list[str]:
    """How to serve the folder, if a server takes it."""
    if exported.seq2seq:
        return ["`model.generate` answers prompts. `vllm serve` takes causal models alone."]
    if exported.kind != "adapter":
        return ["It can be served by `vllm serve FOLDER` and `transformers serve FOLDER`."]
    if exported.served_by_vllm:
        command = code(f"vllm serve {exported.base} --enable-lora --lora-modules NAME=FOLDER")
        return [f"It can be served by {command}; a rank above 16 needs `--max-lora-rank`."]
    return [
        "`vllm serve` does not take this adapter"
        + ("." if exported.tuner.not_merged else "; a model exported with `--merge` can be served.")
    ]


def _training(exported: Exported) -> str:
    config, run = exported.config, exported.run
    assert config.tuner is not None
    training = {
        key: value
        for key, value in config.training.model_dump(exclude_none=True).items()
        if key in ("epochs", "max_steps", "batch_size", "learning_rate", "schedule", "optimizer", "precision")
    }
    base = config.model.name + (f" at {config.model.revision}" if config.model.revision else "")
    origin = run.info.get("converted_from")
    rows = [
        *([("weights converted from", in_markdown(origin))] if origin else ()),
        ("base model", f"{code(base)} in {config.model.quantization or config.model.dtype}"),
        *(("method", _named(method)) for method in config.method),
        ("tuner", _named(config.tuner)),
        ("training", in_markdown(", ".join(f"{key} {_plain(value)}" for key, value in training.items()))),
        ("seed", str(config.seed)),
        ("longest sequence", f"{run.info['max_length']} tokens"),
    ]
    learned = len(run.tasks) if run.joint else exported.row
    tasks = [
        (
            in_markdown(task),
            ("at once" if run.joint else str(run.own_stage(j))) if j < learned else "not learned here",
            str(run.info["tasks"][task]["train"]),
            str(run.info["tasks"][task]["test"]),
            in_markdown(run.matrix["metrics"][task]),
        )
        for j, task in enumerate(run.tasks)
    ]
    return "\n\n".join(
        [
            "## Training",
            _table(("", ""), rows),
            "Options that are not named have their defaults.",
            _table(("task", "stage", "train rows", "test rows", "metric"), tasks),
        ]
    )


def _named(named: Named) -> str:
    options = ", ".join(f"{key} {_plain(value)}" for key, value in named.options.items())
    return code(named.name) + (f" ({in_markdown(options)})" if options else "")


def _quoted(text: str) -> str:
    """A text as a literal of Python."""
    return json.dumps(text)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _scores(exported: Exported) -> str:
    """The summary at this stage: matrix.json's after the last one, and over the tasks so far after an earlier one."""
    run, row = exported.run, exported.row
    last = row == len(run.tasks)
    tasks = run.tasks[:row]
    summary = summarize(
        [scores[:row] for scores in run.scores[: row + 1]],
        metrics={task: run.scorers[task] for task in tasks},
        general={name: values[: row + 1] for name, values in run.matrix["general"].items()},
    )
    ends = run.matrix["intervals"] if last else {}
    rows = [
        (f.label, number(summary[f.key], f.signed), interval(ends.get(f.key), f.signed), f.definition, f.formula)
        for f in FIGURES
        if f.key in summary
    ]
    over = "all tasks" if last else f"the {row} tasks learned by then, as if the run had ended there"
    return (
        f"## Scores\n\nOver {over}. S[t][j] is the score of task j after stage t, T the last stage; row 0 is before "
        "training. Intervals: 95 %, bootstrap over test rows. For losses, lower is better, and differences are turned "
        "round.\n\n" + _table(("figure", "value", "interval", "meaning", "formula"), rows)
    )


def _matrix(run: FinishedRun, exported: int) -> str:
    rows = []
    for t, (name, scores) in enumerate(zip(run.stage_names(), run.scores, strict=True)):
        cells = [in_markdown(name), *(number(score) for score in scores)]
        rows.append([f"**{cell}**" for cell in cells] if t == exported else cells)
    return "## Score matrix\n\nIn bold: this folder.\n\n" + _table(("", *map(in_markdown, run.tasks)), rows)


def _general(run: FinishedRun, row: int) -> str:
    """General abilities before training and of this folder."""
    general = run.matrix["general"]
    if not general:
        return ""
    rows = []
    for name, values in general.items():
        before, after = values[0], values[row]
        change = NOT_MEASURED if before is None or after is None else number(after - before, signed=True)
        rows.append((in_markdown(name), number(before), number(after), change))
    return "## General abilities\n\nOf perplexities, lower is better.\n\n" + _table(
        ("measure", "before training", "this folder", "change"), rows
    )


def _versions(run: FinishedRun) -> str:
    return "## Versions\n\n" + in_markdown(
        ", ".join(f"{name} {version}" for name, version in run.info["versions"].items())
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
