"""The drop-in on a Trainer of a sequence-to-sequence model, with the batches of transformers' own collator."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from holdfast import continual
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from support.seq2seq import seq2seq_model, t5_tokenizer


def rows(seed: int = 0) -> Dataset:
    chance, tokenizer = random.Random(seed), t5_tokenizer()
    pairs = [(f"red: {chance.choice('abcd')}?", chance.choice(("r", "the g", "12"))) for _ in range(16)]
    inputs = [tokenizer(question)["input_ids"] for question, _ in pairs]
    return Dataset.from_dict(
        {"input_ids": inputs, "labels": [tokenizer(text_target=answer)["input_ids"] for _, answer in pairs]}
    )


def trained(kind: Any, folder: Any, size: int = 8, accumulated: int = 1, **more: Any) -> Any:
    arguments = Seq2SeqTrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    made = kind(
        model=seq2seq_model("t5"),
        args=arguments,
        train_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(t5_tokenizer()),
        processing_class=t5_tokenizer(),
        **more,
    )
    made.train()
    return made


def vector(trainer: Any) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in weights(trainer.model)])


def test_it_trains_as_the_plain_trainer(tmp_path):
    plain = vector(trained(Trainer, tmp_path))
    torch.testing.assert_close(vector(trained(continual(Seq2SeqTrainer), tmp_path)), plain, atol=1e-6, rtol=1e-4)
    # transformers' own loss of a T5 counts micro-batches alike, however many tokens they have
    halves = trained(continual(Seq2SeqTrainer), tmp_path, size=4, accumulated=2)
    torch.testing.assert_close(vector(halves), plain, atol=1e-5, rtol=1e-3)


def test_methods_see_rows_over_two_stages(tmp_path):
    (tmp_path / "general.txt").write_text("the sea moves the weed and holds it fast\n" * 24)
    method = ["replay", {"name": "gere_kl", "path": str(tmp_path / "general.txt")}, "lwf", "flow"]
    trainer = trained(continual(Trainer), tmp_path, method=method)
    native = rows()[0]
    replay = trainer.methods[[m.name for m in trainer.methods].index("replay")]
    stored = replay.memory.rows[replay.memory.places.index(0)]
    assert stored == {
        "input_ids": [0, *native["labels"]], "labels": [-100, *native["labels"]], "encoder_ids": native["input_ids"]
    }  # fmt: skip
    trainer.train_dataset = rows(1)
    trainer.train()
    last = [log for log in trainer.state.log_history if "term/replay" in log][-1]
    assert all(last[f"term/{name}"] > 0 for name in ("replay", "gere_kl", "lwf"))
    assert trainer.forgetting_report()["texts"] == 2
    plain = Trainer(
        trainer.model, trainer.args, DataCollatorForSeq2Seq(t5_tokenizer()), processing_class=t5_tokenizer()
    )
    found, expected = (one.evaluate(rows(2))["eval_loss"] for one in (trainer, plain))
    assert found == pytest.approx(expected, rel=1e-2)  # a mean over tokens here, over batches there


def test_another_loss_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="compute_loss_func: a sequence-to-sequence model learns by next-token loss"):
        trained(continual(Trainer), tmp_path, compute_loss_func=lambda *args, **kwargs: 0)
