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
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from holdfast import continual
from holdfast.api import Method
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.models.likelihood import token_losses
from holdfast.training.trainer import _begin_stage
from holdfast.tuners.lora_factors import factors
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


@pytest.mark.parametrize("case", ["GRPOTrainer", "RLOOTrainer"])
def test_general_text_goes_beside_answers_that_the_model_writes(case, tmp_path):
    """The batches of these trainers are lists of prompts, of several micro-batches; the rows go beside them."""
    texts = tmp_path / "general.txt"
    texts.write_text("\n".join(f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw"))
    given = trainer_arguments(case, tmp_path)
    method = {"name": "gere_ce", "path": str(texts), "ratio": 1}
    trainer = continual(trainer_class(case))(**given, method=method)
    [rehearsal], asked, tokens = trainer.methods, [], []
    extra_rows = rehearsal.extra_rows

    def watched(step):
        extra = extra_rows(step)
        asked.append((step.rows, len(extra.rows)))
        tokens.extend(len(row["input_ids"]) for row in extra.rows)
        return extra

    rehearsal.extra_rows = watched
    trainer.train()
    assert asked == [(8, 8)] * 3  # 4 rows in each of two micro-batches
    lines = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["term/gere_ce"] > 1 for log in lines) and lines[-1]["term/gere_ce"] < lines[0]["term/gere_ce"]
    assert trainer.cost.tokens == lines[-1]["num_tokens"] + sum(tokens)


def one_epoch(case, tmp_path, rows, **changes):
    given = trainer_arguments(case, tmp_path, max_steps=-1, num_train_epochs=1, learning_rate=1e-4, **changes)
    given["train_dataset"] = given["train_dataset"].select(range(rows))
    return continual(trainer_class(case))(**given)


@pytest.mark.parametrize(
    ("case", "rows", "changes"),
    [
        ("GRPOTrainer", 5, {}),
        ("GRPOTrainer", 8, {"steps_per_generation": 4, "num_iterations": 2}),
        ("DistillationTrainer", 17, {}),
    ],
)
def test_steps_of_answers_that_the_model_writes_are_counted_as_trl_counts_them(case, rows, changes, tmp_path, caplog):
    """Of 8 rows in a step each is an answer, of which a prompt has four; rows that make no whole batch are left out."""
    trainer = one_epoch(case, tmp_path, rows, **changes)
    asked = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    caplog.clear()
    _begin_stage(trainer, None)
    assert trainer._holdfast.stage.steps == asked > 1
    assert not [record for record in caplog.records if "batch" in record.getMessage()]


def test_too_few_prompts_for_one_batch_of_answers_are_told(tmp_path):
    trainer = one_epoch("GRPOTrainer", tmp_path, rows=3, steps_per_generation=4)
    with pytest.raises(ConfigError, match="answers are written to 4 prompts at once, and of the 3 rows no batch can"):
        trainer.train()


@pytest.mark.parametrize("case", ["DPOTrainer", "KTOTrainer"])
def test_the_rows_of_preferences_are_the_answers_that_are_good(case, tmp_path):
    cls, tokenizer = continual(trainer_class(case)), tiny_tokenizer()
    given, end = trainer_arguments(case, tmp_path), tokenizer.eos_token_id
    pairs = [(row["prompt"], row.get("chosen", row.get("completion"))) for row in given["train_dataset"]]
    if case == "KTOTrainer":
        pairs = pairs[::2]
    seen = []

    class Look(Method):
        name = "look"
        needs_rows = True

        def after_stage(self, stage):
            seen.extend(stage.rows)

    cls(**given, method=Look()).train()
    tokens = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in pairs]
    assert seen == [
        {"input_ids": [*prompt, *good, end], "labels": [*[-100] * len(prompt), *good, end]} for prompt, good in tokens
    ]


@pytest.mark.parametrize("case", ["DPOTrainer", "KTOTrainer"])
def test_methods_that_need_rows_take_part_in_training_on_preferences(case, tmp_path):
    cls = continual(trainer_class(case))
    plain = cls(**trainer_arguments(case, tmp_path))
    plain.train()
    plain.train()
    for method in NEED_ROWS:
        if method in ("lwf", "osf"):
            continue
        trainer = cls(**trainer_arguments(case, tmp_path), method=method)
        trainer.train()
        trainer.train()
        assert trainer.stage_index == 3, method
        log = [line for line in trainer.state.log_history if "loss" in line]
        assert any(name.startswith(f"term/{method}") for name in log[-1]) or method == "mbpa"  # acts at test time
        same = torch.equal(vector(trainer.model), vector(plain.model))
        assert same == (method == "mbpa"), method


def test_a_chosen_answer_is_rehearsed_beside_the_next_task(tmp_path):
    """The term of the first step is the mean loss of the chosen answers that are rehearsed."""
    cls = continual(trainer_class("DPOTrainer"))
    trainer = cls(**trainer_arguments("DPOTrainer", tmp_path), method={"name": "replay", "ratio": 1})
    trainer.train()
    [replay] = trainer.methods
    stored, extra_rows, losses = list(replay.memory.rows), replay.extra_rows, []

    def watched(step):
        extra = extra_rows(step)
        assert len(extra.rows) == step.rows and all(row in stored for row in extra.rows)
        nats, tokens = token_losses(step.stage.model, extra.rows, batch_size=4, pad_token_id=0)
        losses.append(float(nats.sum() / tokens.sum()))
        return extra

    replay.extra_rows = watched
    trainer.train()
    assert logged(trainer, "replay") == pytest.approx(losses, rel=1e-5) and len(losses) == 3


def logged(trainer, name):
    return [log[f"term/{name}"] for log in trainer.state.log_history if f"term/{name}" in log]


@pytest.mark.parametrize("case", ["DPOTrainer", "KTOTrainer"])
def test_adapters_that_a_method_keeps_stay_as_they_are(case, tmp_path):
    """The trainers switch adapters off for their reference, and PEFT would train all of them from then on."""
    cls = continual(trainer_class(case))
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
    trainer = cls(**trainer_arguments(case, tmp_path), peft_config=lora, method="o_lora")
    trainer.train()
    before = {key: w.clone() for key, w in factors(trainer.model).items()}
    trainer.add_callback(EachStep(lambda: seen.append(trained_names(trainer.model))))
    seen: list[set[str]] = []
    trainer.train()
    assert len(seen) == 3 and all(".default." in name for names in seen for name in names)
    for key, w in factors(trainer.model).items():  # the first stage's factors lie first
        assert torch.equal(w[:2] if key.endswith("lora_A") else w[:, :2], before[key])


def test_one_task_after_another_with_lora(tmp_path):
    """Each trainer of preferences has the stage's start as its reference; TRL alone refuses a second one."""
    model, starts = None, []
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
    [replay] = build([("replay", {})])
    for stage, case in enumerate(("SFTTrainer", "DPOTrainer", "KTOTrainer"), 1):
        given = trainer_arguments(case, tmp_path) | ({"peft_config": lora} if model is None else {"model": model})
        trainer = continual(trainer_class(case))(**given, method=replay, task=case, stage_index=stage)
        if stage > 1:
            starts.append({key: w.clone() for key, w in factors(trainer.model).items()})
        trainer.train()
        model = trainer.model
        assert (stage > 1) == bool(logged(trainer, "replay"))
    kept = factors(model, "ref")
    assert all(torch.equal(w, kept[key]) for key, w in starts[1].items())
    assert any(not torch.equal(w, starts[0][key]) for key, w in kept.items())


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


class EachStep(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()


@pytest.mark.parametrize(
    ("case", "method", "reason"),
    [
        ("DPOTrainer", "lwf", "method lwf: works on the task's rows in each batch, .* do not have"),
        ("KTOTrainer", {"name": "replay", "way": "replace"}, "method replay: works on the task's rows in each batch"),
        ("RewardTrainer", "lwf", "method lwf: .* the loss of LlamaForSequenceClassification is not one"),
        ("GRPOTrainer", "ewc", "method ewc: .* needs answers to learn from"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_what_cannot_be_is_refused(case, method, reason, tmp_path):
    trainer = continual(trainer_class(case))(**trainer_arguments(case, tmp_path), method=method)
    with pytest.raises(ConfigError, match=reason):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("case", ["DPOTrainer", "GRPOTrainer"])
def test_a_method_that_reads_outputs_is_refused_where_there_are_none(case, tmp_path):
    class Reads(Method):
        name = "reads"

        def loss_terms(self, step, batch, outputs):
            return {"reads": outputs.logits.mean()}

    trainer = continual(trainer_class(case))(**trainer_arguments(case, tmp_path), method=Reads())
    with pytest.raises(ConfigError, match="method reads: reads what the model makes of the task's rows"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_unpaired_answers_of_which_none_is_good(tmp_path):
    given = trainer_arguments("KTOTrainer", tmp_path)
    given["train_dataset"] = given["train_dataset"].map(lambda row: {"label": False})
    with pytest.raises(ConfigError, match="method replay: train_dataset: no row has label true"):
        continual(trainer_class("KTOTrainer"))(**given, method="replay").train()


NEED_ROWS = ("replay", "ewc", "mas", "a_gem", "gem", "ogd", "lwf", "der", "mbpa", "osf")


@pytest.mark.parametrize("case", ["RewardTrainer", "GRPOTrainer", "RLOOTrainer"])
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
    ],
    ids=["masked", "tokens", "classifier"],
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
