"""What holdfast computes, pinned: small runs by the command line alone, and a hash of each part of their results.

    python benchmarks/pinned.py BEFORE.json --source OLD_CHECKOUT/src
    python benchmarks/pinned.py AFTER.json
    python benchmarks/pinned.py --compare BEFORE.json AFTER.json

Two equal files, made on the same machine with the same libraries, prove that a change of the code changed no number.
The script imports nothing of holdfast, so it runs any version that has this command line. It makes the model, the tasks
and the texts itself, from fixed seeds. Each process uses one thread, so two runs of the same code give the same bits.
All runs take about three minutes of processor time. Exit code 1: a run failed, or the files differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TASKS = ("red", "green")

LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0}
DROPPED = {"name": "lora", "r": 4, "lora_dropout": 0.3}
ADALORA = {"name": "adalora", "init_r": 4, "target_r": 2, "lora_dropout": 0.0, "tinit": 1, "tfinal": 2}
EWC = {"name": "ewc", "strength": 100.0, "samples": 8}
GEM = {"epochs": 8, "learning_rate": 0.01}
"""Long enough that the second task's gradient turns against the first one's."""

PROMPT, WRITE = {"name": "prompt", "num_virtual_tokens": 4}, {"learning_rate": 0.1}
"""Settings with which the trained prompt still writes whole rows, so that there are pseudo samples."""

SGD = {"batch_size": 10, "micro_batch_size": 5, "optimizer": "sgd", "learning_rate": 0.3, "epochs": 2}
"""Training in two processes: the last step of an epoch is uneven. SGD, because AdamW on ZeRO fails in version 0.1.0."""

RUNS: dict[str, dict[str, Any]] = {
    "sequential": {"tuner": "full"},
    "lora": {"tuner": DROPPED},
    "adalora": {"tuner": ADALORA},
    "replay+ewc": {"tuner": "full", "method": [{"name": "replay", "ratio": 0.5}, EWC]},
    "der": {"tuner": "full", "method": {"name": "der", "ratio": 1.0}},
    "kl_replay": {"tuner": LORA, "method": {"name": "kl_replay", "path": "corpus.jsonl"}},
    "kl_pre": {"tuner": "full", "method": {"name": "kl_pre", "length": 12, "buffer": 2}},
    "gere": {"tuner": "full", "method": {"name": "gere", "path": "general.txt"}},
    "gem": {"tuner": "full", "method": "gem", "training": GEM},
    "cia": {"tuner": "full", "method": {"name": "cia", "grouping": 0.9, "samples": 8}},
    "osf": {"method": "osf"},
    "o_lora": {"tuner": LORA, "method": "o_lora"},
    "tree_lora": {"tuner": LORA, "method": "tree_lora"},
    "hide_lora": {"tuner": LORA, "method": "hide_lora"},
    "l2p": {"method": "l2p"},
    "lfpt5": {"tuner": PROMPT, "method": {"name": "lfpt5", "samples": 8, "lm_weight": 1.0}, "training": WRITE},
    "mbpa": {"tuner": "full", "method": {"name": "mbpa", "neighbours": 4, "steps": 2, "replay": 0.1}},
    "ddp": {"tuner": "full", "method": ["replay", EWC], "training": SGD | {"engine": "ddp"}},
    "fsdp2": {"tuner": "full", "method": ["replay", EWC], "training": SGD | {"engine": "fsdp2"}},
    "zero2": {"tuner": "full", "method": ["replay", EWC], "training": SGD | {"engine": "zero2"}},
}
"""What each run adds to :func:`configuration`."""

LAB = "lab"
"""Name of the run that makes a tokenizer and token files and pretrains a model on them."""

STEPS = 400
"""Steps of the tiny model's pretraining."""

PROCESSES = {"ddp": 2, "fsdp2": 2, "zero2": 2}

TIMES = {"seconds", "tokens_per_second"}
"""Keys that differ between two runs that compute the same."""

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


def write_model(folder: Path) -> None:
    """A Llama of 5,712 weights that knows how rows look, but no answer, and a tokenizer whose tokens are characters."""
    signs = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *" .,:?!+=-'\n", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    texts = random.Random(0)
    for _ in range(STEPS):
        batch = fast(
            [row_text(texts) for _ in range(16)], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def row_text(chance: random.Random) -> str:
    """A row with any letter as its answer; every other one as `lfpt5` lets a model write it."""
    name, a, b, answer = chance.choice(TASKS), *chance.choices("abcdefghijklmnopqrstuvwxyz", k=3)
    if chance.random() < 0.5:
        return f"{name}: {a}{b}? {answer}</s>"
    return f"__gen {name}__ {name}: {a}{b}? __ans__  {answer}</s> __end__ "


def write_tasks(folder: Path, names: Sequence[str] = TASKS, train: int = 24, test: int = 8) -> None:
    """Tasks that conflict: each asks for the first letter of its name, and now and then for the last one."""
    for name in names:
        chance = random.Random(name)
        rows = []
        for _ in range(train + test):
            a, b = chance.randrange(26), chance.randrange(26)
            answer = name[0] if a < 22 else name[-1]
            rows.append({"prompt": f"{name}: {chr(97 + a)}{chr(97 + b)}?", "answer": answer})
        (folder / name).mkdir(parents=True)
        (folder / name / "train.json").write_text(json.dumps(rows[:train]), encoding="utf-8")
        (folder / name / "test.json").write_text(json.dumps(rows[train:]), encoding="utf-8")


def write_texts(folder: Path) -> None:
    """General text as lines and as rows, and documents of a language of few words for the laboratory."""
    lines = [f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw"]
    (folder / "general.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    chance = random.Random(0)
    words = [a + b for a in "bcdfg" for b in "aeiou"]
    after = {word: chance.sample(words, 3) for word in words}
    documents = []
    for _ in range(140):
        text = [chance.choice(words)]
        while len(text) < 40:
            text.append(chance.choice(after[text[-1]]))
        documents.append(" ".join(text) + ".")
    (folder / "north.txt").write_text("\n".join(documents), encoding="utf-8")


def configuration(changes: dict[str, Any]) -> dict[str, Any]:
    """Two stages of 36 steps on the tiny model; paths are relative, so that they are the same in every folder."""
    training = {"epochs": 12, "batch_size": 8, "learning_rate": 3e-2, "log_every": 1, "save_every": 10}
    general = [{"name": "sea", "path": "general.txt"}]
    return {
        "model": "model",
        "stream": {"path": "tasks", "order": [*TASKS]},
        "evaluation": {"max_new_tokens": 3, "bootstrap": 50, "general": general},
        "output": "run",
    } | (changes | {"training": training | changes.get("training", {})})


LAB_CONFIG = {
    "model": {"width": 32, "depth": 2, "head_size": 16},
    "data": "tokens",
    "valid": {"north": "valid"},
    "context": 16,
    "training": {"batch_size": 8, "learning_rate": 1e-2, "warmup_tokens": 512, "log_every": 1},
    "stop": {"tokens": 20 * 8 * 16},
    "evaluation": {"every": 10 * 8 * 16, "rows": 16},
    "output": "run",
}

LAB_COMMANDS = (
    "lab tokenizer north.txt --out tokenizer --vocab-size 300 --domain north --max-length 32",
    "lab tokens north.txt --tokenizer tokenizer --out valid --domain north --documents 20",
    "lab tokens north.txt --tokenizer tokenizer --out tokens --domain north --skip 20",
    "lab pretrain config.yaml",
)


def environment(source: Path | None) -> dict[str, str]:
    """The environment of a run. Of this process's own it holds only what changes no number."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    fixed |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    fixed |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return kept | fixed | ({"PYTHONPATH": str(source)} if source else {})


def run(name: str, inputs: Path, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run in a folder of its own, a copy of the inputs, and return the result's hashes, or its ``error``."""
    shutil.copytree(inputs, folder)
    if name == LAB:
        config, commands = LAB_CONFIG, [command.split() for command in LAB_COMMANDS]
    else:
        config = configuration(RUNS[name])
        processes = ["--processes", str(PROCESSES[name])] if name in PROCESSES else []
        commands = [["run", "config.yaml", *processes]]
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "holdfast", *command],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return {"error": f"exit code {done.returncode} of {' '.join(command)}: {done.stderr.strip()[-2000:]}"}
    return lab_result(folder) if name == LAB else result(folder / "run")


FIGURES = (
    "average",
    "new_task",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "general_change",
    "harmonic_mean",
)
"""Those of version 0.1.0."""


def result(path: Path) -> dict[str, Any]:
    """The hashes of a run's directory, and figures that show how far two runs with different hashes lie apart."""
    *_, last = sorted((path / "stages").iterdir())
    kept = [file for file in sorted(last.rglob("*.safetensors")) if file.parent.name != "method"]
    matrix = read_json(path / "matrix.json")
    events = read_lines(path / "events.jsonl")
    responses = {file.name: read_lines(file) for file in sorted(path.glob("stages/*/responses/*.jsonl"))}
    parts = {
        "weights": of_tensors(kept),
        "method": of_tensors(sorted(last.glob("method/*.safetensors"))),
        "method values": of_json({file.name: read_json(file) for file in sorted(last.glob("method/*.json"))}),
        "responses": of_json(responses),
        "terms": of_json(events),
    }
    parts |= {key: of_json(matrix[key]) for key in ("scores", "general")}
    for key in ("summary", "intervals"):  # figures that came later are left out
        parts[key] = of_json({name: value for name, value in matrix[key].items() if name in FIGURES})
    figures = {"steps": len(events), "loss": events[-1]["loss"], "terms": sorted(events[-1]["terms"])}
    figures |= {
        "norm": norm(kept),
        "average": matrix["summary"]["average"],
        "forgetting": matrix["summary"]["forgetting"],
    }
    return {"parts": parts, "figures": figures}


def lab_result(folder: Path) -> dict[str, Any]:
    """The hashes and figures of a laboratory run."""
    path = folder / "run"
    kept = sorted((path / "model").glob("*.safetensors"))
    events = read_lines(path / "events.jsonl")
    parts = {
        "tokenizer": of_bytes([(folder / "tokenizer" / "tokenizer.json").read_bytes()]),
        "tokens": of_bytes([(folder / name / "tokens.bin").read_bytes() for name in ("tokens", "valid")]),
        "weights": of_tensors(kept),
        "terms": of_json(events),
        "evaluations": of_json(read_lines(path / "evaluations.jsonl")),
        "result": of_json(read_json(path / "result.json")),
    }
    return {"parts": parts, "figures": {"steps": len(events), "loss": events[-1]["loss"], "norm": norm(kept)}}


def of_bytes(pieces: Iterable[bytes]) -> str:
    """SHA-256 over the pieces and their borders."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(hashlib.sha256(piece).digest())
    return digest.hexdigest()


def of_json(value: Any) -> str:
    """SHA-256 of a JSON value without its :data:`TIMES`."""
    return of_bytes([json.dumps(timeless(value), sort_keys=True).encode()])


def of_tensors(files: Iterable[Path]) -> str:
    """SHA-256 over the tensors of safetensors files: name of the file and of the tensor, dtype, shape, bytes."""
    found: list[bytes] = []
    for file in files:
        for name, tensor in sorted(load_file(file).items()):
            found.append(f"{file.name} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.append(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return of_bytes(found)


def norm(files: Iterable[Path]) -> float:
    """Euclidean norm of all tensors."""
    squares = [float(tensor.double().square().sum()) for file in files for tensor in load_file(file).values()]
    return sum(squares) ** 0.5


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(below) for key, below in value.items() if key not in TIMES}
    return [timeless(below) for below in value] if isinstance(value, list) else value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pin(out: Path, names: Sequence[str], source: Path | None, keep: Path | None) -> int:
    """Run what is named and write the file; the exit code."""
    env = environment(source)
    command = [sys.executable, "-c", "import holdfast; print(holdfast.__file__)"]
    place = Path(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip())
    if source and source not in place.resolve().parents:
        print(f"--source: {source} holds no package holdfast; {place} would run", file=sys.stderr)
        return 1
    print(f"holdfast of {place.parent}")
    versions = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in LIBRARIES}
    runs: dict[str, Any] = {}
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir(parents=True)
        write_model(inputs / "model")
        write_tasks(inputs / "tasks")
        write_texts(inputs)
        for name in names:
            began = time.monotonic()
            runs[name] = run(name, inputs, Path(folder) / name, env)
            print(f"{name:12} {time.monotonic() - began:5.1f} s  {runs[name].get('figures') or runs[name]['error']}")
            out.write_text(json.dumps({"versions": versions, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in found for found in runs.values()))


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """One line for each run that differs, failed or is missing: its parts that differ and the figures that changed."""
    lines = []
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            lines.append(f"{name}: only in the {'first' if name in one else 'second'} file")
            continue
        pair = one[name], other[name]
        if errors := [found["error"] for found in pair if "error" in found]:
            lines.append(f"{name}: failed: {errors[0]}")
            continue
        first, second = (found["parts"] for found in pair)
        parts = [part for part in first | second if first.get(part) != second.get(part)]
        if parts:
            old, new = (found["figures"] for found in pair)
            moved = [f"{key} {old[key]} -> {new.get(key)}" for key in old if old[key] != new.get(key)]
            lines.append(f"{name}: {', '.join(parts)}" + (f" ({'; '.join(moved)})" if moved else ""))
    return lines


def compare(first: Path, second: Path, names: Sequence[str] | None) -> int:
    """Print which runs differ and in which parts; the exit code."""
    files = [read_json(path) for path in (first, second)]
    if files[0]["versions"] != files[1]["versions"]:
        print(f"the libraries differ, so numbers may: {files[0]['versions']} and {files[1]['versions']}")
    one, other = ({n: found for n, found in file["runs"].items() if not names or n in names} for file in files)
    lines = differences(one, other)
    print("\n".join(lines) if lines else f"{len(one)} runs are equal")
    return int(bool(lines) or not one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="file to write")
    parser.add_argument("--source", type=Path, help="folder that holds the package holdfast; absent: what is installed")
    parser.add_argument("--only", action="append", choices=[*RUNS, LAB], metavar="NAME", help="of all runs; repeatable")
    parser.add_argument("--keep", type=Path, help="new folder in which the runs stay")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="files to compare")
    asked = parser.parse_args()
    if (asked.out is None) == (asked.compare is None):
        parser.error("give either OUT.json or --compare A.json B.json")
    if asked.compare:
        sys.exit(compare(asked.compare[0], asked.compare[1], asked.only))
    source = asked.source.resolve() if asked.source else None
    sys.exit(pin(asked.out, asked.only or [*RUNS, LAB], source, asked.keep))


if __name__ == "__main__":
    main()
