"""What every tuner must be: it trains its own weights, saves what plain libraries load, goes on where it stopped."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import sys
import types
import warnings
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    TrainingArguments,
)

import holdfast.models.quantization
import holdfast.runner.loop
import holdfast.runner.run
import holdfast.runner.stage
import holdfast.training.arguments
from holdfast.api.tuner import TargetOptions
from holdfast.config.model import ModelConfig
from holdfast.config.run import load_config
from holdfast.config.section import Named
from holdfast.config.training import TrainingConfig
from holdfast.errors import ConfigError
from holdfast.models.generation import generate
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from holdfast.training.trainer import ContinualTrainer
from holdfast.tuners import build, known
from holdfast.tuners.peft import PeftTuner
from support.paths import DOCS
from support.tiny import VOCABULARY, pad_rows, tiny_config, tiny_model, tiny_rows


@dataclass(frozen=True)
class Case:
    """A tuner as it is tested.

    Attributes:
        tuner: its name and options.
        trained: pattern of the names of what it trains.
        neutral: whether logits before training are the base model's.
        tolerance: in logits, where its start takes singular values apart and together again.
    """

    tuner: str
    trained: str
    options: dict[str, Any] = field(default_factory=dict)
    neutral: bool = True
    tolerance: float = 1e-5


def lora(trained: str = r"\.lora_[AB]\.", **options: Any) -> Case:
    return Case("lora", trained, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options)


CASES = {
    "full": Case("full", ""),
    "freeze": Case("freeze", r"layers\.1\.|model\.norm\.", {"blocks": 1}),
    "freeze with head": Case("freeze", r"layers\.1\.|lm_head\.", {"blocks": 1, "norm": False, "head": True}),
    "lora": lora(),
    "dora": lora(r"\.lora_([AB]|magnitude_vector)\.", use_dora=True),
    "rslora": lora(use_rslora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa, iterated": lora(init_lora_weights="pissa_niter_2"),
    "olora": lora(init_lora_weights="olora"),
    "adalora": Case(
        "adalora", r"\.lora_[ABE]\.", {"init_r": 4, "target_r": 2, "lora_dropout": 0.0, "lora_alpha": 8, "tfinal": 2}
    ),
    "ia3": Case("ia3", r"\.(k_proj|v_proj|down_proj)\.ia3_l\."),
    "prompt": Case("prompt", r"prompt_encoder\.", {"num_virtual_tokens": 5}, neutral=False),
    "p_tuning": Case("p_tuning", r"prompt_encoder\.", {"num_virtual_tokens": 5}, neutral=False),
    "p_tuning by an LSTM": Case(
        "p_tuning",
        r"prompt_encoder\.",
        {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.5},
        neutral=False,
    ),
    "prefix": Case("prefix", r"prompt_encoder\.", {"num_virtual_tokens": 5}, neutral=False),
    "prefix by a network": Case(
        "prefix", r"prompt_encoder\.", {"num_virtual_tokens": 5, "prefix_projection": True}, neutral=False
    ),
    "osf": Case("osf", r"\.osf_svd_params\.", tolerance=2e-5),
}
SOFT = [name for name, case in CASES.items() if case.tuner in ("prompt", "p_tuning", "prefix")]
WITHIN_PEFT = {
    name: cls
    for name, cls in known().items()
    if issubclass(cls, PeftTuner) and cls.config_class.__module__.startswith("peft.")
}


def llama(**changes: Any) -> Any:
    """Weights so large that every token matters, not the last one alone."""
    return tiny_model(initializer_range=0.2, tie_word_embeddings=False, **changes)


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.2))


def opt() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return OPTForCausalLM(OPTConfig(**sizes, **tokens, dropout=0.0, init_std=0.2))


def small(model: type, config: type) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return model(config(**sizes, **tokens, num_attention_heads=2, max_position_embeddings=64))


def tuner_of(case: Case) -> Any:
    tuner = build(Named(name=case.tuner, **case.options))
    tuner.plan(TrainingConfig(), 20)
    return tuner


def prepared(case: Case, model: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return tuner_of(case).prepare(model)


def moved(model: Any) -> Any:
    """As after some training."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Of the tokens of each row, one row at a time without padding."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0, -len(row) :] for row in rows])


def texts(count: int = 4) -> list[list[int]]:
    return [row["input_ids"] for row in tiny_rows(count, length=12)]


@pytest.mark.parametrize("name", CASES)
def test_only_its_own_weights_are_trained_and_a_gradient_reaches_each(name):
    case = CASES[name]
    model = moved(prepared(case, llama())).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(re.search(case.trained, n) for n in trained)
    if case.tuner in ("full", "freeze"):
        assert len(trained) == sum(bool(re.search(case.trained, n)) for n, _ in model.named_parameters())
    model(**pad_rows(tiny_rows(4))).loss.backward()
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum()] == []
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), 0.1).step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained)


@pytest.mark.parametrize("name", CASES)
def test_before_training_it_is_the_base_model_where_it_starts_neutral(name):
    case = CASES[name]
    expected, found = logits(llama().eval(), texts()), logits(prepared(case, llama()).eval(), texts())
    if case.neutral:
        torch.testing.assert_close(found, expected, rtol=0, atol=case.tolerance)
    else:
        assert float((found - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_loads_with_plain_libraries_and_here_and_gives_the_same_logits(name, tmp_path):
    case = CASES[name]
    tuner = tuner_of(case)
    torch.manual_seed(1)
    model = moved(tuner.prepare(llama()))
    model.train()
    tuner.save(model, tmp_path)
    expected = logits(model.eval(), texts())
    if tuner.folder == "model":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        plain = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(plain, texts()), expected, rtol=0, atol=case.tolerance)
    base = llama()
    torch.manual_seed(99)  # what a random start leaves behind must not be seen after loading
    other = tuner.prepare(base)
    tuner.load(other, tmp_path)
    torch.testing.assert_close(logits(other.eval(), texts()), expected, rtol=0, atol=case.tolerance)
    trained = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(p, trained[1][n]) for n, p in trained[0].items())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tuner != "prefix"])
def test_recomputed_activations_give_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = moved(prepared(CASES[name], llama())).train()
        for part in model.modules():
            if isinstance(part, torch.nn.LSTM):
                part.dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**pad_rows(tiny_rows(4)), use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_generation_in_left_padded_batches_equals_one_at_a_time(name):
    model = moved(prepared(CASES[name], llama()))
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_ids": [], "pad_token_id": 0}
    alone = generate(model, texts(7), batch_size=1, **options)
    assert generate(model, texts(7), batch_size=7, **options) == alone
    plain = []  # without a cache and without transformers' generation
    for row in texts(7):
        ids = list(row)
        for _ in range(6):
            ids.append(int(logits(model, [ids])[-1].argmax()))
        plain.append(ids[len(row) :])
    assert alone == plain


def test_every_tuner_has_its_defaults_described():
    assert {"full", "freeze", "lora", "adalora", "prompt", "prefix", "p_tuning", "ia3", "osf"} <= set(known())
    for name, cls in known().items():
        assert cls.__doc__
        for key, option in cls.Options.model_fields.items():
            assert option.description, f"{name}.{key}"


@pytest.mark.parametrize("name", [name for name, cls in known().items() if cls.folder == "adapter"])
def test_an_adapter_is_merged_unless_its_tuner_says_why_not(name, tmp_path):
    tuner = build(Named(name=name))
    tuner.plan(TrainingConfig(), 10)
    tuner.save(tuner.prepare(llama()), tmp_path)
    merged = None
    with contextlib.suppress(ValueError, AttributeError):
        merged = PeftModel.from_pretrained(llama(), str(tmp_path)).merge_and_unload()
    assert (merged is None) == bool(tuner.not_merged)
    assert bool(tuner.lacks) == bool(tuner.not_merged)  # PEFT's own adapters of layers are loaded as they are


def test_vllm_serves_the_two_factors_of_lora_alone():
    assert build(Named(name="lora", r=4, use_rslora=True)).served_by_vllm
    for options in ({"use_dora": True}, {"modules_to_save": ["norm"]}, {"lora_bias": True}):
        assert not build(Named(name="lora", **options)).served_by_vllm
    assert not any(build(Named(name=name)).served_by_vllm for name in known() if name != "lora")


@pytest.mark.parametrize("name", WITHIN_PEFT)
def test_options_are_peft_s_own_and_a_wrong_one_is_named(name):
    for key in WITHIN_PEFT[name].Options.model_fields.keys() - TargetOptions.model_fields:
        assert key in WITHIN_PEFT[name].config_class.__dataclass_fields__, key
    near = {"prompt": "num_virtual_token", "prefix": "num_virtual_token", "p_tuning": "num_virtual_token"}
    typo = near.get(name, "target_module")
    with pytest.raises(ConfigError, match=f"tuner {name}: {typo}: unknown key; did you mean '{typo}s'"):
        build(Named(name=name, **{typo: 1}))
    with pytest.raises(ConfigError, match="task_type: unknown key"):
        build(Named(name=name, task_type="SEQ_CLS"))


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ({"name": "lora", "target_modules": ["nowhere"]}, "tuner lora: .*nowhere"),
        ({"name": "lora", "init_lora_weights": "pisa"}, "did you mean 'pissa'"),
        ({"name": "lora", "init_lora_weights": "eva"}, "init_lora_weights: 'eva' cannot be used; known: .*pissa"),
        ({"name": "adalora", "target_r": 12}, "target_r: 12 must be less than init_r, 12"),
        ({"name": "adalora", "tinit": 10, "tfinal": 10, "total_step": 20}, "leave none of 20 steps"),
        ({"name": "adalora", "tinit": 0, "tfinal": 1, "total_step": 2}, "leave none of 2 steps"),
        ({"name": "adalora"}, "total_step: outside of a run"),
        ({"name": "ia3", "target_modules": ["k_proj"]}, "target_modules and feedforward_modules: give both"),
        ({"name": "freeze", "blocks": 3}, "blocks: 3 are more than the model's 2"),
        ({"name": "lor"}, "there is no tuner 'lor'; did you mean 'lora'"),
    ],
)
def test_what_cannot_be_is_refused(tuner, message):
    with pytest.raises(ConfigError, match=message):
        build(Named(**tuner)).prepare(tiny_model())


class Killed(BaseException):
    """Takes a run down as a signal would: nothing of its process goes on."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("freeze with head", "rslora", "olora")])
def test_two_stages_of_a_run_and_the_same_when_it_is_killed_in_the_second(name, tmp_path, monkeypatch):
    case = CASES[name]
    config = tiny_config(tmp_path, tuner={"name": case.tuner} | case.options, output=str(tmp_path / "unbroken"))
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": 2, "save_every": 2, "learning_rate": 0.5 if name in SOFT else 1e-2}
    config["data"] = {"test_rows": 3}
    monkeypatch.setattr(holdfast.runner.loop.RunLoop, "_report", lambda self: None)
    holdfast.runner.run.run(config, Progress(quiet=True))

    watch = holdfast.runner.stage.StageWatch.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch(self, args, state, control, **kwargs)
        if self.stage.index == 2 and state.global_step == 3:  # after the checkpoint of step 2
            raise Killed

    broken = config | {"output": str(tmp_path / "broken")}
    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", dying)
        with pytest.raises(Killed):
            holdfast.runner.run.run(broken, Progress(quiet=True))
    assert list(tmp_path.glob("broken/stages/02-green/checkpoint/checkpoint-2/complete.json"))
    holdfast.runner.run.run(broken, Progress(quiet=True))

    for path in sorted(tmp_path.glob("unbroken/stages/*/*/*")):
        other = tmp_path / "broken" / path.relative_to(tmp_path / "unbroken")
        if path.suffix == ".safetensors":
            one, two = load_file(path), load_file(other)
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), path
        elif path.suffix == ".jsonl" or path.parent.name == "method":
            assert path.read_text() == other.read_text(), path
    losses = [event["terms"]["task"] for event in events(tmp_path / "unbroken") if event["stage"] == 1]
    assert losses[-1] < losses[0]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


# freeze


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (gpt2, r"transformer\.h\.1\.|transformer\.ln_f\."),
        (opt, r"decoder\.layers\.1\.|decoder\.final_layer_norm\."),
        (lambda: small(GPTNeoXForCausalLM, GPTNeoXConfig), r"gpt_neox\.layers\.1\.|gpt_neox\.final_layer_norm\."),
    ],
)
def test_freeze_finds_the_blocks_and_the_final_norm(model, pattern):
    frozen = build(Named(name="freeze", blocks=1)).prepare(model())
    for name, p in frozen.named_parameters():
        assert p.requires_grad == bool(re.search(pattern, name)), name


# lora


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_of_a_moved_base_does_not_depend_on_who_makes_its_start(init, tmp_path):
    """Another machine finds other first factors; after loading, base and factors are those of the first one."""
    case = lora(init_lora_weights=init)
    tuner = tuner_of(case)
    model = moved(prepared(case, llama()))
    tuner.save(model, tmp_path)
    other = prepared(case, llama(), seed=3)
    torch.manual_seed(4)
    with torch.no_grad():  # as if the singular vectors had come out otherwise
        elsewhere = {key: w + 0.1 * torch.randn_like(w) for key, w in other.start.items()}
    other._begin_at(elsewhere)
    assert all(torch.equal(w, elsewhere[key]) for key, w in other.start.items())
    torch.testing.assert_close(logits(other.eval(), texts()), logits(llama().eval(), texts()), rtol=0, atol=1e-4)
    tuner.load(other, tmp_path)
    torch.testing.assert_close(logits(other.eval(), texts()), logits(model, texts()), rtol=0, atol=2e-5)
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_moved_base_is_saved_as_peft_converts_it(use_rslora, tmp_path):
    """PEFT converts where it is given the adapter as it was before training."""
    case = lora(init_lora_weights="pissa", use_rslora=use_rslora)
    moved(prepared(case, llama())).save_pretrained(tmp_path / "ours")
    plain = get_peft_model(llama(), tuner_of(case).config(llama()))
    plain.save_pretrained(str(tmp_path / "start"))
    moved(plain).save_pretrained(
        str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(w, theirs[key]) for key, w in ours.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for key in ("r", "lora_alpha", "use_rslora", "init_lora_weights", "inference_mode", "base_model_name_or_path"):
        assert (configs[0][key] or None) == (configs[1][key] or None), key  # PEFT 0.20 writes "" for no base model


def test_saving_a_moved_base_takes_no_random_numbers(tmp_path):
    """Or else the run would depend on how often it is saved."""
    model = prepared(lora(init_lora_weights="pissa"), llama())
    before = torch.random.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


# adalora

ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "lora_dropout": 0.0, "tinit": 2, "tfinal": 3}


def test_adalora_is_the_documented_loop_of_peft(tmp_path):
    """Forward with PEFT's own regulariser, backward, step, update_and_allocate, zero_grad, written out plainly."""
    rows, steps = tiny_rows(12), 9
    plain: Any = get_peft_model(
        llama(),
        AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", orth_reg_weight=0.1, **ADALORA, total_step=steps
        ),
    )
    tuner = build(Named(name="adalora", **ADALORA, total_step=steps))
    ours = tuner.prepare(llama())
    ours.load_state_dict(plain.state_dict())

    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.05)
    trainer = ContinualTrainer(
        model=ours,
        args=TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=0.05, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0, report_to="none", logging_steps=1, use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=rows,
        data_collator=pad_rows,
        method=tuner.companion(),
    )  # fmt: skip
    batches: list[Any] = []
    take = trainer.training_step

    def recorded(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append({key: value.clone() for key, value in inputs.items()})
        return take(model, inputs, *args, **kwargs)

    trainer.training_step = recorded
    trainer.train()
    plain.train()
    losses = []
    for number, batch in enumerate(batches, start=1):
        loss = plain(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        plain.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    assert len(batches) == steps
    theirs = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-3)
    assert all(line["term/orthogonality"] > 0.1 for line in logged)


def kept(folder: Path) -> list[int]:
    """How many singular values of each layer are not zero."""
    return [
        int((w != 0).sum()) for key, w in load_file(folder / "adapter_model.safetensors").items() if "lora_E" in key
    ]


def test_adalora_s_budget_falls_over_all_stages_of_a_run(tmp_path):
    options = ADALORA | {"name": "adalora", "tinit": 0.2, "tfinal": 0.2}
    config = tiny_config(tmp_path, tuner=options)
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": [2, 3], "learning_rate": 1e-2}
    assert prepare(resolve(load_config(config))).tuner.options.total_step == 2 * 3 + 3 * 3

    def planned(**changes: Any) -> int:
        return prepare(resolve(load_config(config | changes))).tuner.options.total_step

    assert planned(method="joint", training={"epochs": 1, "batch_size": 10}) == 5
    assert planned(training={"max_steps": 4}) == 8
    assert planned(data={"packing": True}, training={"batch_size": 1}) < 48
    holdfast.runner.run.run(config, Progress(quiet=True))
    folders = [tmp_path / "run" / "stages" / stage / "adapter" for stage in ("01-red", "02-green")]
    first, last = map(kept, folders)
    assert len(last) == 14 and sum(last) == 14 * 2 < sum(first) < 14 * 4
    assert len(set(last)) > 1  # more where it matters more
    saved = load_file(folders[1] / "adapter_model.safetensors")
    assert all(len(w) == 4 for key, w in saved.items() if "lora_A" in key)  # all triplets, so that others may come back
    terms = [event["terms"] for event in events(tmp_path / "run")]
    assert all(term["orthogonality"] > 0 for term in terms)
    state = json.loads((tmp_path / "run/stages/02-green/method/adalora.json").read_text())
    assert state["steps"] == 15


def test_adalora_does_not_depend_on_accumulation(tmp_path):
    """PEFT's own regulariser would count once a micro-batch."""
    config = tiny_config(tmp_path, tuner={"name": "adalora"} | ADALORA)
    config["stream"]["order"] = ["red"]
    config["training"] |= {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.1}
    found = []
    for micro in (8, 2):
        config = config | {"output": str(tmp_path / f"run-{micro}")}
        config["training"] = config["training"] | {"micro_batch_size": micro}
        holdfast.runner.run.run(config, Progress(quiet=True))
        found.append(load_file(tmp_path / f"run-{micro}/stages/01-red/adapter/adapter_model.safetensors"))
    for key, w in found[0].items():
        torch.testing.assert_close(found[1][key], w, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


# ia3


@pytest.mark.parametrize(
    ("model", "attention", "feedforward"),
    [
        (lambda: small(Olmo2ForCausalLM, Olmo2Config), {"k_proj", "v_proj"}, {"down_proj"}),
        (lambda: small(Phi3ForCausalLM, Phi3Config), {"qkv_proj"}, {"down_proj"}),
        (gpt2, {"c_attn"}, {"mlp.c_proj"}),
        (llama, {"k_proj", "v_proj"}, {"down_proj"}),
    ],
)
def test_ia3_finds_the_layers_to_scale(model, attention, feedforward):
    base = model()
    expected = logits(base.eval(), texts())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaled = build(Named(name="ia3")).prepare(base)
    assert scaled.peft_config["default"].target_modules == attention | feedforward
    assert scaled.peft_config["default"].feedforward_modules == feedforward
    found = [n for n, p in scaled.named_parameters() if p.requires_grad]
    assert len(found) == 2 * len(attention | feedforward)
    torch.testing.assert_close(logits(scaled.eval(), texts()), expected, rtol=0, atol=1e-6)


# prompts and prefixes


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("model", [llama, gpt2, opt])
def test_soft_prompts_and_prefixes_do_not_show(model, name, tmp_path):
    """Logits, hidden states and losses are those of the row's own tokens, whichever way it is padded; and PEFT's."""
    tuned = moved(prepared(CASES[name], model()))
    tuned.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(model(), str(tmp_path)).eval()
    rows = tiny_rows(5, length=12)
    right = pad_rows(rows)
    left = {key: torch.stack([w.roll(int((m == 0).sum())) for w, m in zip(value, right["attention_mask"], strict=True)])
            for key, value in right.items()}  # fmt: skip
    expected = logits(plain, [row["input_ids"] for row in rows])
    for batch in (right, left):
        found = tuned(**batch, output_hidden_states=True)
        own = batch["attention_mask"].bool()
        assert found.logits.shape[:2] == batch["input_ids"].shape == found.hidden_states[-1].shape[:2]
        torch.testing.assert_close(found.logits[own], expected, rtol=1e-4, atol=1e-5)
        loss = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(found.loss, loss)
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned, texts()), logits(model().eval(), texts()), rtol=1e-5, atol=1e-6)


def test_a_prefix_and_recomputed_activations_are_refused(tmp_path):
    """transformers would leave the cache out, in which the prefix lies, and train nothing."""
    config = tiny_config(tmp_path, tuner="prefix")
    config["training"] |= {"gradient_checkpointing": True}
    with pytest.raises(ConfigError, match=r"tuner prefix: .* cache .* turn gradient checkpointing off"):
        prepare(resolve(load_config(config)))
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False)
    setattr(args, holdfast.training.arguments.GRADIENT_CHECKPOINTING, True)
    model = prepared(CASES["prefix"], llama())
    with pytest.raises(ConfigError, match="gradient checkpointing off"):
        ContinualTrainer(model=model, args=args, train_dataset=tiny_rows(4), data_collator=pad_rows).train()
    assert model.eval()(**pad_rows(tiny_rows(2))).loss > 0  # evaluation does not recompute


@pytest.mark.parametrize("name", SOFT)
def test_a_prompt_takes_its_place_in_the_context(name, tmp_path):
    config = tiny_config(tmp_path, tuner={"name": CASES[name].tuner} | CASES[name].options)
    assert prepare(resolve(load_config(config))).max_length == 128 - 5


def test_a_network_s_dropout_is_off_where_its_prompt_is_saved(tmp_path):
    case = CASES["p_tuning by an LSTM"]
    model = prepared(case, llama()).train()
    model.save_pretrained(tmp_path)
    assert model.training and all(part.training for part in model.prompt_encoder.modules())
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        expected = model.eval().get_prompt(1)[0]
    torch.testing.assert_close(saved, expected)


# quantization


def test_without_bitsandbytes_quantization_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = tiny_config(tmp_path, tuner="lora")
    config["model"] = {"name": config["model"], "quantization": "4bit"}
    with pytest.raises(ConfigError, match=r"model\.quantization: .*`pip install bitsandbytes"):
        prepare(resolve(load_config(config)))
    config["model"]["quantization"] = "3bit"
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        load_config(config)


@pytest.mark.parametrize("name", ["full", "freeze", "osf"])
def test_tuners_of_the_model_s_own_weights_refuse_quantization(name, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, tuner=name)
    config["model"] = {"name": config["model"], "quantization": "4bit"}
    with pytest.raises(ConfigError, match=f"model.quantization: tuner '{name}' .* such as lora"):
        prepare(resolve(load_config(config)))


@pytest.mark.parametrize(
    ("dtype", "compute"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("stored", "bfloat16")]
)
def test_what_transformers_is_told_is_qlora_s(dtype, compute, tmp_path, monkeypatch):
    """A stand-in for bitsandbytes shows what the model would be loaded with."""
    version, told = importlib.metadata.version, {}
    stand_in = types.ModuleType("bitsandbytes")
    stand_in.__spec__ = ModuleSpec("bitsandbytes", None)
    config = tiny_config(tmp_path, tuner={"name": "lora", "r": 4})
    config["model"] = {"name": config["model"], "quantization": "4bit", "dtype": dtype}

    def from_pretrained(name: str, **options: Any) -> Any:
        told.update(options)
        return tiny_model(dtype=torch.bfloat16), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", stand_in)
        patch.setattr(
            importlib.metadata, "version", lambda name: "0.49.0" if name == stand_in.__name__ else version(name)
        )
        patch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
        setup = prepare(resolve(load_config(config)))
        patch.setattr(setup.tuner, "prepare", lambda model: model)
        model = holdfast.runner.load.load_model(setup)
    asked = told["quantization_config"]
    assert asked.load_in_4bit and asked.bnb_4bit_quant_type == "nf4" and asked.bnb_4bit_use_double_quant
    assert asked.bnb_4bit_compute_dtype == told["dtype"] == getattr(torch, compute)
    assert list(told["device_map"]) == [""]
    assert all(
        p.dtype == torch.float32 and not p.requires_grad for p in model.parameters()
    )  # none of them is quantised
    assert holdfast.models.quantization.weight_options(ModelConfig(name="x", dtype="stored"), "cpu") == {
        "dtype": "auto"
    }


# the page

PAGE = DOCS / "tuners" / "README.md"


def test_the_page_s_defaults_are_those_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    tuners = {case.tuner for case in CASES.values()}
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == tuners
    for name, section in sections.items():
        rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, re.MULTILINE)
        options = known()[name].Options.model_fields
        assert {key: json.loads(value) for key, value in rows} == {key: o.default for key, o in options.items()}, name
    assert all(len(line) <= 120 or line.startswith("|") for line in text.splitlines())
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PAGE.parent / link).exists(), link


def test_the_page_s_trainer_runs(tmp_path):
    """With what it takes for granted: a model, arguments and rows."""
    block = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    args = TrainingArguments(str(tmp_path), max_steps=300, report_to="none", use_cpu=True, remove_unused_columns=False)
    names: dict[str, Any] = {"model": tiny_model(), "args": args, "rows": tiny_rows(8)}
    exec(compile(block, str(PAGE), "exec"), names)
    trainer = names["trainer"]
    trainer.data_collator, trainer.args.max_steps = pad_rows, 3
    trainer.train()
    assert names["tuner"].options.total_step == 300 and trainer.methods[1].steps == 3


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens", "norm"])
@pytest.mark.parametrize(
    "options",
    [
        {"name": "lora"},
        {"name": "lora", "use_dora": True},
        {"name": "lora", "init_lora_weights": "pissa"},
        {"name": "adalora", "total_step": 20},
        {"name": "p_tuning"},
        {"name": "prefix", "prefix_projection": True},
        *({"name": name} for name in ("adapter", "ia3", "moe_lora", "osf", "prefix", "prompt")),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_modules_to_save_come_back(options, saved, tmp_path):
    def prepared(seed: int) -> Any:
        torch.manual_seed(seed)
        return tuner.prepare(tiny_model())

    tuner = build(Named.model_validate(options | {"modules_to_save": [saved]}))
    model = prepared(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(saved in name for name in trained)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn_like(p))
    tuner.save(model, tmp_path)
    again = prepared(1)
    tuner.load(again, tmp_path)
    loaded = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert loaded.keys() == trained.keys()
    for name, p in loaded.items():
        assert torch.equal(p, trained[name]), name
    ids = {"input_ids": torch.arange(3, 20)[None]}
    assert torch.equal(again.eval()(**ids).logits, model.eval()(**ids).logits)
