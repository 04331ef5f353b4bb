"""Batches of any kind pass through a continual trainer; what a method cannot use is refused with the reason."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    default_data_collator,
)

from holdfast import continual
from holdfast.errors import ConfigError
from holdfast.methods import build
from support.tiny import tiny_model, tiny_rows, tiny_tokenizer
from support.trained import vector
from support.trl_cases import trainer_arguments, trainer_class


class Line(nn.Module):
    """Linear regression; its inputs are called neither input_ids nor labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def forward(self, x, y=None):
        made = self.layer(x).squeeze(-1)
        return {"loss": ((made - y) ** 2).mean(), "made": made}


class Strict(Trainer):
    """Reads its batches by attribute, as a BatchEncoding allows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert inputs.labels.shape == inputs.input_ids.shape
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def points(count=12):
    return [{"x": torch.tensor([i / 10, 1 - i / 10]), "y": torch.tensor(0.3 * i)} for i in range(count)]


def sentences():
    return [{"input_ids": row["input_ids"], "label": number % 2} for number, row in enumerate(tiny_rows(12))]


def encoded(rows):
    """A BatchEncoding, with masks, of rows of different lengths."""
    batch = tiny_tokenizer().pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
    return BatchEncoding(dict(batch) | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})


def classifier():
    return LlamaForSequenceClassification(tiny_model(num_labels=2).config)


CASES = {
    "regression": (Trainer, Line, points, default_data_collator),
    "classification": (Trainer, classifier, sentences, DataCollatorWithPadding(tiny_tokenizer())),
    "stream": (Trainer, tiny_model, lambda: Dataset.from_list(tiny_rows(12)).to_iterable_dataset(), encoded),
    "by attribute": (Strict, tiny_model, lambda: tiny_rows(12), encoded),
}


@pytest.mark.parametrize("case", CASES)
def test_sequential_leaves_batches_alone(case, tmp_path):
    cls, make_model, rows, collator = CASES[case]
    results = []
    for kind in (cls, continual(cls)):
        torch.manual_seed(0)
        given = trainer_arguments("Trainer", tmp_path)
        given |= {"model": make_model(), "train_dataset": rows(), "data_collator": collator}
        trainer = kind(**given)
        before = vector(trainer.model).clone()
        trainer.train()
        assert not torch.equal(vector(trainer.model), before)
        results.append(vector(trainer.model))
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ["DPOTrainer", "GRPOTrainer"])
@pytest.mark.parametrize("method", ["cia", "si"])
def test_methods_on_weights_take_part_in_any_training(case, method, tmp_path):
    """They need no row: the average of the weights, and the path that these take."""
    cls = trainer_class(case)
    plain, ours = cls(**trainer_arguments(case, tmp_path)), continual(cls)
    plain.train()
    trainer = ours(**trainer_arguments(case, tmp_path), method=method)
    trainer.train()
    same = torch.equal(vector(plain.model), vector(trainer.model))
    assert same == (method == "si")  # which penalises nothing in the first stage
    if method == "si":
        trainer.train()
        assert [log["term/si"] for log in trainer.state.log_history if "loss" in log][-1] > 0


def test_general_text_goes_beside_preferences(tmp_path):
    texts = tmp_path / "general.txt"
    texts.write_text("\n".join(f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw"))
    cls = continual(trainer_class("DPOTrainer"))
    trainer = cls(**trainer_arguments("DPOTrainer", tmp_path), method={"name": "gere", "path": str(texts)})
    trainer.train()
    lines = [log for log in trainer.state.log_history if "loss" in log]
    assert lines[0]["term/gere"] == pytest.approx(0, abs=1e-5) and lines[-1]["term/gere"] > 0
    assert trainer.forgetting_report()["texts"] == 2


@pytest.mark.parametrize(
    ("case", "method", "reason"),
    [
        ("DPOTrainer", "lwf", "method lwf: .* does not make input_ids and a label for each"),
        ("RewardTrainer", "lwf", "method lwf: .* the loss of LlamaForSequenceClassification is not one"),
        ("GRPOTrainer", {"name": "gere", "path": "general.txt"}, "method gere: .* of type list"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_what_cannot_be_is_refused(case, method, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "general.txt").write_text("the sea moves the weed and holds it fast\n" * 24)
    trainer = continual(trainer_class(case))(**trainer_arguments(case, tmp_path), method=method)
    with pytest.raises(ConfigError, match=reason):
        trainer.train()
    assert trainer.state.global_step == 0


NEED_ROWS = ("replay", "ewc", "mas", "a_gem", "gem", "ogd", "lwf", "der", "mbpa", "osf")


@pytest.mark.parametrize("case", ["DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer"])
def test_methods_that_need_rows_of_tokens_are_refused_before_training(case, tmp_path):
    """Also those that would look at the rows only after the stage."""
    trainer = continual(trainer_class(case))(**trainer_arguments(case, tmp_path))
    before = vector(trainer.model)
    for method in NEED_ROWS:
        trainer.methods = build([(method, {})])
        with pytest.raises(ConfigError, match=f"method {method}: "):
            trainer.train()
    assert trainer.state.global_step == 0 and torch.equal(vector(trainer.model), before)


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 64}


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: BertForMaskedLM(BertConfig(**BERT)), r"the loss of BertForMaskedLM is not one \(ForMaskedLM\)"),
        (lambda: BertForTokenClassification(BertConfig(**BERT, num_labels=64)), "ForTokenClassification"),
        (classifier, "ForSequenceClassification"),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_ff=8, num_layers=1)),
            "decoder's tokens",
        ),
    ],
    ids=["masked", "tokens", "classifier", "encoder-decoder"],
)
def test_a_model_of_another_loss_is_refused_before_training(make_model, reason, tmp_path):
    """Labels of a masked model lie at their tokens, so a next-token loss of its rows would be another one."""
    (tmp_path / "general.txt").write_text("the sea moves the weed and holds it fast\n" * 24)
    given = trainer_arguments("Trainer", tmp_path) | {"model": make_model(), "data_collator": encoded}
    trainer = continual(Trainer)(**given)
    for method, options in (*((name, {}) for name in NEED_ROWS), ("gere_ce", {"path": str(tmp_path / "general.txt")})):
        trainer.methods = build([(method, options)])
        with pytest.raises(ConfigError, match=f"method {method}: .*{reason}"):
            trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_of_which_nothing_is_trained(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    given = trainer_arguments("Trainer", tmp_path) | {"model": model}
    with pytest.raises(ConfigError, match=r"no parameter of it is trainable.*is_trainable=True"):
        continual(Trainer)(**given, method="replay").train()
