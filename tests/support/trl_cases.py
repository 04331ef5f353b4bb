"""Tiny models, data and arguments for transformers' and TRL's trainers, a case for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, LlamaForSequenceClassification

from support.tiny import tiny_model, tiny_tokenizer, write_model

PLAIN = ("Trainer", "Seq2SeqTrainer")
TRL = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer", "DistillationTrainer")
CASES = PLAIN + TRL
PAIRS = [(f"ask {a}{b}?", f" {b}{a}") for a in "abc" for b in "uvwxyz"]


def trainer_class(case: str) -> Any:
    """The class that a case is named after; the test is skipped where it needs TRL and TRL is not installed."""
    return getattr(_library(case), case)


def trainer_arguments(case: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """What the class of a case is constructed with: new objects in every call, and equal ones."""
    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if case in TRL:
        settings["bf16"] = False
    if case in ("GRPOTrainer", "RLOOTrainer"):
        settings |= {"num_generations": 4, "max_completion_length": 6}
    if case == "DistillationTrainer":
        settings["max_completion_length"] = 6
    config = {"Trainer": "TrainingArguments", "Seq2SeqTrainer": "Seq2SeqTrainingArguments"}
    config_class = getattr(_library(case), config.get(case, case.replace("Trainer", "Config")))
    tokenizer = tiny_tokenizer()
    given = {
        "model": _model(case, folder),
        "args": config_class(**settings | changes),
        "train_dataset": Dataset.from_list(_rows(case)),
        "processing_class": tokenizer,
    }
    if case in PLAIN:
        given["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
    if case in ("GRPOTrainer", "RLOOTrainer"):
        given["reward_funcs"] = count_vowels
    if case == "DistillationTrainer":
        given["teacher_model"] = tiny_model(seed=1)
    return given


def count_vowels(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs from completion to completion."""
    return [float(sum(sign in "aeiou" for sign in text)) for text in completions]


def _library(case: str) -> Any:
    return transformers if case in PLAIN else pytest.importorskip("trl", reason="TRL is not installed")


def _model(case: str, folder: Path) -> Any:
    """A model from a folder, since some trainers load their reference model from there again."""
    if case == "RewardTrainer":
        config = tiny_model(num_labels=1).config
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config)
    if not (folder / "model").exists():
        write_model(folder / "model")
    return LlamaForCausalLM.from_pretrained(folder / "model")


def _rows(case: str) -> list[dict[str, Any]]:
    if case in PLAIN:
        tokens = [[tiny_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in PAIRS]
        return [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in tokens]
    if case == "SFTTrainer":
        return [{"prompt": p, "completion": a} for p, a in PAIRS]
    if case == "KTOTrainer":
        return [{"prompt": p, "completion": a, "label": number % 2 == 0} for number, (p, a) in enumerate(PAIRS)]
    if case in ("DPOTrainer", "RewardTrainer"):
        return [{"prompt": p, "chosen": a, "rejected": a[::-1]} for p, a in PAIRS]
    return [{"prompt": p} for p, _ in PAIRS]
