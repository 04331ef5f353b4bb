"""The drop-in on trainers as they are: Trainer, Seq2SeqTrainer, TRL's SFTTrainer, and one with its own loss."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from holdfast import ContinualTrainer, continual
from holdfast.data.collate import Collator, pack
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.sequential import Sequential
from support.tiny import tiny_model, tiny_tokenizer

PAIRS = [(f"ask {a}{b}?", f" {b}{a}") for a in "abcdef" for b in "uvwxyz"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "general.txt"
    lines = [f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw"]
    path.write_text("\n".join(lines))
    return str(path)


def tokenised():
    """A dataset as people have it: input ids, labels on the answer, and a text column that nobody needs."""
    tokenizer = tiny_tokenizer()
    rows = []
    for prompt, answer in PAIRS:
        p, a = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        rows.append({"input_ids": p + a, "labels": [-100] * len(p) + a, "text": prompt + answer})
    return Dataset.from_list(rows)


def options(folder, cls=TrainingArguments, **changes):
    values = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 6,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(**values | changes)


def logged(trainer, name):
    return [log[f"term/{name}"] for log in trainer.state.log_history if f"term/{name}" in log]


def test_trainer_as_the_readme_shows_it(tmp_path, texts):
    tokenizer = tiny_tokenizer()
    trainer = ContinualTrainer(
        model=tiny_model(),
        args=options(tmp_path, eval_strategy="steps", eval_steps=3),
        train_dataset=tokenised(),
        eval_dataset=tokenised().select(range(6)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        method={"name": "gere", "path": texts, "ratio": 0.5},
    )
    trainer.train()
    assert logged(trainer, "gere")[0] == pytest.approx(0, abs=1e-6) and logged(trainer, "gere")[-1] > 0
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    model = copy.deepcopy(trainer.model).eval()
    plain = Trainer(model, options(tmp_path), data_collator=DataCollatorForSeq2Seq(tokenizer))
    assert losses[-1] == pytest.approx(plain.evaluate(tokenised().select(range(6)))["eval_loss"], rel=1e-4)
    report = trainer.forgetting_report()
    assert report["texts"] == 2 and report["change"] == pytest.approx(report["after"] - report["before"])


def test_rehearsal_keeps_general_text(tmp_path, texts):
    """Loss on held-out general text rises less with replay of general samples than without."""
    changes = []
    for weight in (1e-9, 1.0):
        trainer = ContinualTrainer(
            model=tiny_model(),
            args=options(tmp_path, max_steps=30),
            train_dataset=tokenised(),
            data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
            processing_class=tiny_tokenizer(),
            method={"name": "gere_ce", "path": texts, "weight": weight, "ratio": 1.0},
        )
        trainer.train()
        changes.append(trainer.forgetting_report()["change"])
    assert changes[1] < changes[0] - 0.1


def test_a_sequence_of_datasets_with_one_trainer(tmp_path):
    trainer = ContinualTrainer(
        model=tiny_model(),
        args=options(tmp_path),
        train_dataset=tokenised().select(range(18)),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        processing_class=tiny_tokenizer(),
        method=["replay", {"name": "ewc", "samples": 4}],
    )
    trainer.train()
    trainer.train_dataset = tokenised().select(range(18, 36))
    trainer.train()
    [replay, _] = trainer.methods
    assert sorted(set(replay.memory.tasks)) == [1, 2] and len(replay.memory) == 36
    assert logged(trainer, "replay")[-1] > 0 and logged(trainer, "ewc")[-1] > 0


def test_seq2seq_trainer(tmp_path, texts):
    trainer = continual(Seq2SeqTrainer)(
        model=tiny_model(),
        args=options(tmp_path, Seq2SeqTrainingArguments),
        train_dataset=tokenised(),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
        method={"name": "gere_kl", "path": texts},
    )
    trainer.train()
    assert logged(trainer, "gere_kl")[-1] > 0


class OwnLoss(Trainer):
    """Overrides compute_loss as LLaMA-Factory's and ms-swift's trainers do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_own_loss_and_what_trainer_offers(changes, tmp_path, texts):
    trainer = continual(OwnLoss)(
        model=tiny_model(),
        args=options(tmp_path, **changes),
        train_dataset=tokenised(),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
        method=["lwf", {"name": "gere", "path": texts, "weight": "dynamic"}, "replay"],
    )
    trainer.train()
    for name in ("lwf", "gere", "gere/ce"):
        assert logged(trainer, name)[-1] > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_resume_from_checkpoint(tmp_path, texts):
    results = []
    for kind in ("whole", "resumed"):
        for steps in (3, 6) if kind == "resumed" else (6,):
            trainer = ContinualTrainer(
                model=tiny_model(),
                args=options(
                    tmp_path / kind, save_strategy="steps", save_steps=3, max_steps=6, lr_scheduler_type="constant"
                ),
                train_dataset=tokenised(),
                data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
                processing_class=tiny_tokenizer(),
                method={"name": "gere_l2", "path": texts},
            )
            if steps == 3:
                trainer.add_callback(StopAt(3))
            trainer.train(resume_from_checkpoint=kind == "resumed" and steps == 6)
        results.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("packing", [False, True])
def test_trl(packing, tmp_path, texts):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    tokenizer = tiny_tokenizer()
    dataset = Dataset.from_list([{"prompt": p, "completion": a} for p, a in PAIRS])
    trainer = continual(trl.SFTTrainer)(
        model=tiny_model(),
        args=options(tmp_path, trl.SFTConfig, packing=packing, max_length=32, bf16=False),
        train_dataset=dataset,
        processing_class=tokenizer,
        method=[{"name": "gere", "path": texts, "weight": 10}, "replay"],
    )
    trainer.train()
    assert logged(trainer, "gere")[0] == pytest.approx(0, abs=1e-5) and logged(trainer, "gere")[-1] > 0
    memory = trainer.methods[1].memory
    assert len(memory) > 0 and any(label != -100 for label in memory.rows[0]["labels"])
    assert trainer.forgetting_report()["texts"] == 2


def test_reports_need_general_samples(tmp_path):
    trainer = ContinualTrainer(model=tiny_model(), args=options(tmp_path), method="replay")
    with pytest.raises(ConfigError, match="needs a method that rehearses general"):
        trainer.forgetting_report()


class OwnInputs(Trainer):
    """Adds to the inputs of the forward pass, as ms-swift's trainer does."""

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs) | {"logits_to_keep": 0}


def test_a_trainer_that_prepares_inputs_its_own_way(tmp_path, texts):
    trainer = continual(OwnInputs)(
        model=tiny_model(),
        args=options(tmp_path),
        train_dataset=tokenised(),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
        method=[{"name": "gere", "path": texts}, {"name": "ewc", "samples": 2}],
    )
    trainer.train()
    assert logged(trainer, "gere")[-1] > 0


def test_a_collator_with_a_mask_of_four_dimensions(tmp_path, texts):
    """LLaMA-Factory's neat packing keeps sequences apart by such a mask."""
    pad = DataCollatorForSeq2Seq(tiny_tokenizer())

    def collate(rows):
        batch = dict(pad(rows))
        seen = (
            batch["attention_mask"][:, None, None, :].bool()
            & torch.ones(batch["input_ids"].shape[1:] * 2).tril().bool()
        )
        batch["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return batch

    trainer = ContinualTrainer(
        model=tiny_model(),
        args=options(tmp_path),
        train_dataset=tokenised().remove_columns("text"),
        data_collator=collate,
        processing_class=tiny_tokenizer(),
        method=[{"name": "gere", "path": texts}, "replay"],
    )
    trainer.train()
    assert logged(trainer, "gere")[-1] > 0 and trainer.cost.tokens > 0
    assert len(trainer.methods[1].memory) == len(PAIRS)


def test_a_compiled_model_learns_what_a_plain_one_does(tmp_path, texts):
    weights = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = ContinualTrainer(
            model=tiny_model(),
            args=options(tmp_path, **compiled),
            train_dataset=tokenised(),
            data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
            processing_class=tiny_tokenizer(),
            method=[{"name": "gere_kl", "path": texts}, "lwf", {"name": "ewc", "samples": 2}],
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_sequences_without_padding(tmp_path):
    """All rows of a batch in one sequence: its terms and its share of past rows are those of the padded batch."""
    weights = []
    for collator in (DataCollatorForSeq2Seq(tiny_tokenizer()), DataCollatorWithFlattening()):
        trainer = ContinualTrainer(
            model=tiny_model(),
            args=options(tmp_path),
            train_dataset=tokenised().remove_columns("text").select(range(18)),
            data_collator=collator,
            processing_class=tiny_tokenizer(),
            method={"name": "replay", "ratio": 0.5},
        )
        trainer.train()
        trainer.train_dataset = tokenised().remove_columns("text").select(range(18, 36))
        trainer.train()
        assert len(trainer.methods[0].memory) == 36
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    trainer.methods = build([("replay", {"way": "replace"})])
    trainer.train()
    with pytest.raises(ConfigError, match="rows that share a sequence cannot be replaced"):
        trainer.train()


def test_rows_that_share_a_padded_sequence_count_one_by_one(tmp_path):
    rows = pack(tokenised().to_list(), 50)
    assert len({len(row["input_ids"]) for row in rows}) > 1  # so that one is padded
    trainer = ContinualTrainer(
        model=tiny_model(),
        args=options(tmp_path, max_steps=1, per_device_train_batch_size=len(rows)),
        train_dataset=rows,
        data_collator=Collator(0),
        processing_class=tiny_tokenizer(),
        method=(counter := CountRows()),
    )
    trainer.train()
    assert counter.seen == [len(PAIRS)]


class CountRows(Sequential):
    def __init__(self):
        super().__init__()
        self.seen = []

    def extra_rows(self, step):
        self.seen.append(step.rows)


def test_a_stream_of_rows_without_a_length(tmp_path, texts):
    """General samples go beside any dataset; only a method that stores rows of it needs one with a length."""

    def train(method):
        trainer = ContinualTrainer(
            model=tiny_model(),
            args=options(tmp_path),
            train_dataset=tokenised().to_iterable_dataset(),
            data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
            processing_class=tiny_tokenizer(),
            method=method,
        )
        trainer.train()
        return trainer

    assert logged(train({"name": "gere", "path": texts}), "gere")[-1] > 0
    with pytest.raises(ConfigError, match="train_dataset: has no length"):
        train("replay")
