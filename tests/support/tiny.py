"""A tiny model, tokenizer and tasks that the tests share; all of it made here, from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.api.stage import Stage

VOCABULARY = 64


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A Llama of a few thousand parameters."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**options | changes))


def tiny_rows(count: int, seed: int = 0, length: int = 8) -> list[dict[str, list[int]]]:
    """Random rows of different lengths; the first half of each is the prompt."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(length // 2, length + 1))]
        half = len(ids) // 2
        rows.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    return rows


def pad_rows(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Right-padded batch, written plainly as a check on the real collator."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([list(r[k]) + [v] * (longest - len(r[k])) for r in rows]) for k, v in fill.items()}
    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    return batch | {"attention_mask": torch.tensor(mask)}


def tiny_stage(model: Any, rows: list[Any], index: int = 1, micro_batch_size: int = 4) -> Stage:
    """A stage that no trainer made."""
    return Stage(index, f"task{index}", model, rows, pad_rows, 0, micro_batch_size)


def tiny_tokenizer(*more: str, model_max_length: int = 128, **options: Any) -> PreTrainedTokenizerFast:
    """Characters as tokens: 0 pad, 1 bos, 2 eos, then letters, digits, a few signs, and more of them."""
    signs = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *" .,:?!+=-'\n", "<unk>", *more]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        **options,
    )


def write_model(folder: Path, seed: int = 0) -> Path:
    """The tiny model and tokenizer as a folder that transformers loads."""
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_chat_model(folder: Path, context: int = 128) -> Path:
    """The same with a chat template and a context of so many tokens."""
    tiny_model(max_position_embeddings=context).save_pretrained(folder)
    tokenizer = tiny_tokenizer(model_max_length=context)
    turn = "{{ bos_token }}{{ m['content'] }}{{ eos_token }}"
    begin = "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{begin}"
    tokenizer.save_pretrained(folder)
    return folder


def write_tasks(folder: Path, names: Sequence[str] = ("red", "green", "blue"), train: int = 24, test: int = 8) -> Path:
    """Prompt/answer tasks that a few steps learn: the answer is nearly always the first letter of the task's name."""
    for name in names:
        chance = random.Random(name)
        rows = []
        for _ in range(train + test):
            a, b = chance.randrange(26), chance.randrange(26)
            prompt = f"{name}: {chr(97 + a)}{chr(97 + b)}?"
            rows.append({"prompt": prompt, "answer": name[0] if a < 22 else name[-1]})
        (folder / name).mkdir(parents=True)
        (folder / name / "train.json").write_text(json.dumps(rows[:train]), encoding="utf-8")
        (folder / name / "test.json").write_text(json.dumps(rows[train:]), encoding="utf-8")
    return folder


def tiny_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run on the tiny model and tasks below ``folder``, which are made if they are not there."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_tasks(folder / "tasks")
    return {
        "model": str(folder / "model"),
        "tuner": "full",
        "method": "sequential",
        "stream": {"path": str(folder / "tasks"), "order": ["red", "green", "blue"]},
        "training": {"epochs": 6, "batch_size": 8, "learning_rate": 3e-2, "log_every": 1, "save_every": 100},
        "evaluation": {"max_new_tokens": 3, "bootstrap": 50, "shift": 0},
        "output": str(folder / "run"),
    } | changes
