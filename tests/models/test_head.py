"""The head: its formula in each architecture, adapters on it with their gradients, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OSFConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from holdfast.api.stage import Rehearsed, Step
from holdfast.errors import ConfigError
from holdfast.losses import chunked_kl, kl_divergence
from holdfast.losses.next_token import predicting
from holdfast.methods.der import DER
from holdfast.methods.lwf import LwF
from holdfast.models.head import bounded, head, trained_head, whole_head
from holdfast.models.sampling import sample
from holdfast.models.supervised import OneRow, head_on, keeps_its_loss, predictions
from holdfast.rehearsal.head_check import check_head
from holdfast.system.files import read_jsonl
from holdfast.tuners.moe_lora.config import MoeLoraConfig
from holdfast.tuners.soft_prompts import SoftPromptModel
from support.engine_jobs import alone, error, job, launch
from support.tiny import VOCABULARY, pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage

IDS = torch.arange(3, 11)[None]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "hyperclovax": {"logits_scaling": 3.0},
    "falcon_h1": MAMBA | {"lm_head_multiplier": 0.2},
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "nanochat": {"final_logit_softcapping": 0.5},
    "recurrent_gemma": {"logits_soft_cap": 0.5, "lru_width": 16},
    "gpt_neox": {},
    "phi": {},
}


def model_of(kind: str, **options: Any) -> Any:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | options)).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases, too, which begin at zero
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_gives_the_models_logits(kind: str) -> None:
    model = model_of(kind, **KINDS[kind])
    with torch.no_grad():
        outputs = model(input_ids=IDS, output_hidden_states=True, use_cache=False)
        last = outputs.hidden_states[-1][0]
        torch.testing.assert_close(whole_head(model).logits(last), outputs.logits[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bounded(model, model.get_output_embeddings()(last)), outputs.logits[0])
    check_head(tiny_stage(model, tiny_rows(2)), tiny_rows(1)[0], "lwf")


@pytest.mark.parametrize("kind", ["cohere", "gemma2", "mamba"])  # mamba makes float32 of rounded logits
def test_a_rounded_model_is_no_other_formula(kind: str) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(sizes if kind == "mamba" else SIZES | KINDS[kind]))
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    check_head(tiny_stage(model, tiny_rows(2)), tiny_rows(1)[0], "lwf")


ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, lora_alpha=7, target_modules=["lm_head", "q_proj"], lora_dropout=0.5),
    "lora with a bias": LoraConfig(r=2, lora_bias=True, target_modules=["lm_head"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["lm_head"]),
    "adalora": AdaLoraConfig(init_r=2, total_step=10, target_modules=["lm_head"]),
    "ia3 of outputs": IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "ia3 of inputs": IA3Config(target_modules=["lm_head"], feedforward_modules=["lm_head"]),
    "osf": OSFConfig(target_modules=["lm_head"]),
    "a trained copy": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def adapted(config: PeftConfig) -> Any:
    model = get_peft_model(tiny_model(tie_word_embeddings=False).double(), config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head_counts_with_its_gradient(name: str) -> None:
    """KL of a model to itself is 0; the gradient of KL to another is that of the layer's own logits, and that of finite
    differences, except where PEFT itself takes something for a constant (DoRA's norm) or projects gradients (OSF)."""
    model = adapted(ADAPTERS[name]).double()
    model.eval()
    hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1].detach()
    teacher = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    now = trained_head(model)
    assert now is not None

    def loss() -> Tensor:
        return chunked_kl(hidden, head(model), teacher, now, None, chunk_size=3)[0]

    assert abs(float(chunked_kl(hidden, head(model), hidden, now, None)[0].detach())) < 1e-9
    model.train()  # dropout does not act
    loss().backward()
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    assert parameters
    found = [p.grad.clone() for p in parameters]
    model.zero_grad()
    model.eval()
    logits = model.get_base_model().get_output_embeddings()(hidden)
    kl_divergence(logits, now.logits(teacher))[0].backward()
    for p, gradient in zip(parameters, found, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-6, atol=1e-9)
        if name in ("dora", "osf"):
            continue
        flat = gradient.flatten()
        places = flat.abs().topk(min(3, len(flat))).indices
        assert flat[places].abs().min() > 0
        for place in places:
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[place] += step
                    values.append(float(loss().detach()))
                    p.view(-1)[place] -= step
            assert float(flat[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_lwf_is_zero_at_first_with_lora_on_the_head() -> None:
    """The whole term, with a live teacher; before, the adapter on the head was left out of it."""

    model, rows = adapted(ADAPTERS["lora"]), tiny_rows(4)
    stage = tiny_stage(model, rows)
    method = LwF()
    method.before_stage(stage)
    batch = pad_rows(rows)
    model.eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for moved in (False, True):
        if moved:
            model.base_model.model.lm_head.lora_B["default"].weight.data[7].add_(0.5)
        outputs = model(**inputs, output_hidden_states=True)
        step = Step(stage, 0, 4, 1, True)
        step.rehearsed = {"lwf": Rehearsed([], batch["labels"], None, (outputs.hidden_states[-1],), 1.0)}
        term = method.loss_terms(step, batch, outputs)["lwf"]
        assert (float(term) > 1e-3) if moved else abs(float(term)) < 1e-9, float(term)


def test_an_adapter_that_is_no_matrix_is_refused() -> None:
    model = get_peft_model(tiny_model(), MoeLoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match=r"method lwf: .* an adapter \(MoeLoraLinear\) that is no matrix"):
        LwF().before_stage(tiny_stage(model, tiny_rows(2)))


@pytest.mark.parametrize("method", [LwF(), DER()])
def test_logits_of_another_formula_are_refused_before_training(method: Any) -> None:
    model = model_of("modernbert-decoder", layer_types=["full_attention", "full_attention"], cls_token_id=1)
    with pytest.raises(ConfigError, match=rf"method {method.name}: .* logits of ModernBertDecoderForCausalLM are not"):
        method.before_stage(tiny_stage(model, tiny_rows(2)))


def test_sampling_of_another_formula_goes_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of every step are the model's own, whatever it makes of its head."""

    class Shifted(type(tiny_model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs["logits"] = outputs.logits + 9.0 * (torch.arange(VOCABULARY) == 7)
            return outputs

    model = tiny_model()
    model.__class__ = Shifted
    drawn = sample(model, [[1, 4]], max_new_tokens=6, seed=0)
    assert drawn.tokens[0].count(7) >= 5


@pytest.mark.slow
def test_an_adapter_on_the_head_on_engines_that_divide_it(tmp_path: Path) -> None:
    """Two processes compute the terms of one, and so the adapter gets the same gradient."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    base = tiny_config(tmp_path, method={"name": "lwf", "weight": 5.0})
    base["tuner"] = {"name": "lora", "r": 2, "target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.0}
    base["stream"] |= {"order": ["red", "green"]}
    training = {"epochs": 1, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.3, "optimizer": "sgd"}
    one, *divided = [
        base | {"training": training | {"engine": engine, "log_every": 1}, "output": str(tmp_path / str(engine))}
        for engine in (None, "fsdp2", "zero3")
    ]
    alone([one])
    launch([job(config) for config in divided], 2, tmp_path)
    assert [error(config) for config in divided] == ["", ""]

    def terms(config: dict[str, Any]) -> list[float]:
        return [line["terms"]["lwf"] for line in read_jsonl(Path(config["output"], "events.jsonl"))]

    assert max(terms(one)) > 0.1
    for config in divided:
        assert terms(config) == pytest.approx(terms(one), rel=1e-3, abs=1e-5)


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same_on_supervised_tokens(model: Any) -> None:
    """The model's own loss, its gradients and the logits are those of a head that is applied to every position."""
    assert keeps_its_loss(model)
    batch = pad_rows(tiny_rows(5))
    row, mask = OneRow.of(batch["labels"]), predicting(batch["labels"])
    expected = loss_and_gradients(model, batch)
    with head_on(model, row) as gathered:
        found = loss_and_gradients(model, batch | {"labels": row.labels})
    assert gathered.done and len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    labels = batch.pop("labels")
    logits = predictions(model, batch, labels, use_cache=False)
    assert logits.shape == (int(mask.sum()), VOCABULARY)
    torch.testing.assert_close(logits, model(**batch, use_cache=False).logits[mask], rtol=1e-5, atol=1e-6)
    assert predictions(model, batch, torch.full_like(labels, -100), use_cache=False).shape == (0, VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_on_supervised_tokens_alone_is_the_models_own(kind: str) -> None:
    assert_same_on_supervised_tokens(model_of(kind, **KINDS[kind]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_the_head_acts_on_supervised_tokens(name: str) -> None:
    assert_same_on_supervised_tokens(adapted(ADAPTERS[name]).eval())


def test_what_the_loss_of_other_models_needs_stays_as_it_is() -> None:
    class Mine(type(tiny_model())):  # type: ignore[misc]
        """A forward pass of the user's own may do anything with the labels."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = tiny_model()
    model.__class__ = Mine
    assert not keeps_its_loss(model)
    prompts = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert not keeps_its_loss(prompts)
    batch = pad_rows(tiny_rows(3))
    labels = batch.pop("labels")
    found = predictions(SoftPromptModel(tiny_model(), prompts.active_peft_config), batch, labels)
    assert found.shape == (int(predicting(labels).sum()), VOCABULARY)
