"""Every model family does what holdfast builds on: heads, hidden states, adapters, padding, and a run of two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from holdfast import load_config, methods, run
from holdfast.api.task import Example, Turn
from holdfast.config.model import ModelConfig
from holdfast.config.section import Named
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError
from holdfast.models.generation import generate
from holdfast.models.head import head, hidden_only
from holdfast.models.pretrained import load_tokenizer
from holdfast.runner.load import load_model, trained_weights
from holdfast.runner.setup import prepare, resolve
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from holdfast.tuners import build
from support.families import FAMILIES, SIZES, family_model, write_family
from support.goes_on import check_goes_on
from support.tiny import VOCABULARY, pad_rows, tiny_config, tiny_rows, tiny_stage, write_tasks

LORA = {"name": "lora", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
TUNERS = {"full": {"name": "full"}, "lora": LORA}

families = pytest.mark.parametrize("name", FAMILIES)
tuned = pytest.mark.parametrize("tuner", TUNERS)


def tuned_model(name: str, tuner: str) -> Any:
    """A family's model as a tuner trains it; LoRA's update, zero at first, is made random."""
    model = build(Named(**TUNERS[tuner])).prepare(family_model(name)).eval()
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.2)
    return model


def random_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


# --- head and hidden states ---


@torch.no_grad()
def check_head(model: Any) -> None:
    outputs = model(input_ids=random_ids(), output_hidden_states=True)
    torch.testing.assert_close(head(model).logits(outputs.hidden_states[-1]), outputs.logits, atol=1e-5, rtol=1e-5)


@families
@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_and_head_give_the_models_own_logits(name, tied):
    model = family_model(name, tie_word_embeddings=tied)
    assert (head(model).weight is model.get_input_embeddings().weight) == tied
    check_head(model)


@pytest.mark.parametrize(
    ("config", "scale"), [(CohereConfig, {"logit_scale": 0.3}), (GraniteConfig, {"logits_scaling": 3.0})]
)
def test_a_head_with_a_scale_gives_the_models_own_logits(config, scale):
    torch.manual_seed(0)
    check_head(AutoModelForCausalLM.from_config(config(**SIZES | scale)).eval())


@torch.no_grad()
def test_gemma2s_logits_are_capped():
    model = family_model("gemma2")
    hidden = model(input_ids=random_ids(), output_hidden_states=True).hidden_states[-1]
    uncapped = head(model)._replace(softcap=None).logits(hidden)
    assert head(model).softcap == 1.5 and uncapped.abs().max() > 2 and head(model).logits(hidden).abs().max() < 1.5


@families
@tuned
@torch.no_grad()
def test_hidden_states_of_a_padded_batch_are_those_of_single_rows(name, tuner):
    model, rows = tuned_model(name, tuner), tiny_rows(6, length=14)
    found = tiny_stage(model, rows).hidden_states(rows)
    for row, hidden in zip(rows, found, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
        torch.testing.assert_close(hidden, alone.hidden_states[-1][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(head(model).logits(hidden), alone.logits[0], atol=1e-5, rtol=1e-4)
    assert hidden_only(model) == {"logits_to_keep": 1}


# --- what is trained ---


@families
def test_lora_adapts_attention_and_mlp(name):
    family = FAMILIES[name]
    model = build(Named(**LORA)).prepare(family_model(name))
    adapted = {key.split(".lora_A.")[0] for key, _ in model.named_parameters() if ".lora_A." in key}
    layers = [f"base_model.model.{key}" for key, _ in family_model(name).named_modules()]
    linear = {key for key in layers if key.rpartition(".")[2] in family.linear}
    assert {key.rpartition(".")[2] for key in linear} == set(family.linear)
    experts = {key for key in layers if family.parameters and key.endswith(("experts", "mlp.gate"))}
    assert adapted == linear | experts | {f"{key}.base_layer" for key in experts if key.endswith("experts")}


experts = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.parameters])


@experts
def test_what_stacked_experts_cannot_take_is_refused(name):
    for option in ({"lora_dropout": 0.05}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ConfigError, match=r"tuner lora: stacked experts .*leave lora_dropout, "):
            build(Named(name="lora", **option)).prepare(family_model(name))
    attention = build(Named(name="lora", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert not any(
        "experts" in key for key, p in attention.prepare(family_model(name)).named_parameters() if p.requires_grad
    )


@pytest.mark.parametrize("name", ["gain_lora", "inflora", "n_lora", "o_lora", "seq_lora_merge"])
def test_methods_that_lay_adapters_together_refuse_stacked_experts(name):
    stage = tiny_stage(build(Named(name="lora")).prepare(family_model("mixtral")), tiny_rows(4))
    [method] = methods.build([(name, {})])
    with pytest.raises(ConfigError, match=f"method '{name}': needs adapters of linear layers, not of stacked experts"):
        method.before_stage(stage)


@experts
@pytest.mark.parametrize("options", [{}, {"lora_dropout": "former"}], ids=["default", "former"])
def test_plain_lora_on_stacked_experts_leaves_dropout_out(name, options):
    model = build(Named(name="lora", **options)).prepare(family_model(name)).train()
    assert model.peft_config["default"].lora_dropout == 0
    assert not any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules())


@pytest.mark.parametrize(("given", "dropout"), [({}, 0.0), ({"lora_dropout": "former"}, 0.05)])
def test_the_dropout_is_pefts_elsewhere(given, dropout):
    """Equal logits and configuration of the tuner with nothing but defaults and of PEFT that is told of them."""
    found = []
    for tuner in (build(Named(name="lora", **given)), None):
        torch.manual_seed(1)
        if tuner is None:
            options = {"task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "lora_dropout": dropout}
            model = get_peft_model(family_model("llama3"), LoraConfig(**options, target_modules="all-linear"))
        else:
            model = tuner.prepare(family_model("llama3"))
        for key, p in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p)
        torch.manual_seed(2)
        found.append((model.peft_config["default"].to_dict(), model.train()(**pad_rows(tiny_rows(4))).logits))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_experts_can_be_adapted_by_name():
    options = {"name": "lora", "r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = build(Named(**options)).prepare(family_model("qwen2_moe"))
    trained = [key for key, p in model.named_parameters() if p.requires_grad and ".experts." in key]
    assert len(trained) == 2 * 2 * 2, "A and B of two parameters in two layers"


@families
@tuned
def test_a_gradient_reaches_every_trained_parameter_and_expert(name, tuner):
    model = tuned_model(name, tuner)
    model(**pad_rows(tiny_rows(16))).loss.backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            parts = p.grad if p.dim() == 3 else p.grad[None]
            assert all(part.any() for part in parts), key


# --- generation ---


@families
@tuned
def test_left_padded_batches_generate_what_single_rows_do(name, tuner):
    model = tuned_model(name, tuner)
    prompts = [row["input_ids"] for row in tiny_rows(9, length=20)] + [[5]]
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_ids": [2], "pad_token_id": 2}
    found = generate(model, prompts, batch_size=4, **options)
    for prompt, response in zip(prompts, found, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 8:
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == 2:
                break
            ids.append(token)
        assert response == ids[len(prompt) :]
    assert len({tuple(response) for response in found}) > 3


@families
def test_queries_share_keys_and_values_where_the_architecture_can(name):
    layers = {key.rpartition(".")[2]: module for key, module in family_model(name).named_modules()}
    if "q_proj" in layers:
        assert layers["q_proj"].out_features == 2 * layers["k_proj"].out_features
    elif "qkv_proj" in layers:
        assert layers["qkv_proj"].out_features == (4 + 2 + 2) * 4
    else:
        assert name == "gpt_neox"


def test_attention_that_gemma2_cannot_use_is_refused(tmp_path):
    config = run_config(tmp_path, "gemma2", "full", ["sequential"])
    config["model"] = {"name": config["model"], "attention": "sdpa"}
    with pytest.raises(ConfigError, match=r"model\.name: .*scaled_dot_product_attention"):
        load_model(prepare(resolve(load_config(config))))


# --- tokenizer ---


@families
def test_rows_begin_and_end_as_the_familys_tokenizer_has_it(tmp_path, name):
    family = FAMILIES[name]
    write_family(tmp_path, name)
    tokenizer = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert tokenizer.pad_token == ("</s>" if "pad" in family.missing else "<pad>")
    encoder = Encoder(tokenizer, max_length=64)
    assert encoder.chat == (family.template is not None)
    turns = (Turn("system", "be brief"), Turn("user", "red?"), Turn("assistant", "r"))
    example = Example("rows.json", 0, turns)
    [row] = encoder.encode(example)
    supervised = [label for label in row["labels"] if label != -100]
    text = tokenizer.decode(row["input_ids"])
    begin = "<s>" if family.begins else ""
    assert text.startswith(begin) and text.count("<s>") == len(begin) // 3
    assert encoder.prompt(example, reserve=8) == row["input_ids"][: -len(supervised)]
    if encoder.chat:
        assert tokenizer.decode(supervised) == "r</t>\n"
        assert encoder.stop_ids == [2, tokenizer.convert_tokens_to_ids("</t>")]
        assert "be brief" in text and ("[system]" in text) == ("System role" not in family.template)
    else:
        assert text == f"{begin}be brief\nred? r</s>" and supervised[-1] == 2 and encoder.stop_ids == [2]


# --- runs ---

METHODS: dict[str, list[Any]] = {
    "replay, ewc": ["replay", {"name": "ewc", "samples": 4}],
    "kl": [{"name": "gere_kl"}],
    "margin": [{"name": "gere"}],
}
METHODS["all"] = METHODS["kl"] + METHODS["margin"] + METHODS["replay, ewc"]


def run_config(folder: Path, name: str, tuner: str, method: list[Any]) -> dict[str, Any]:
    """A run of two short stages on a family's model."""
    write_family(folder / "model", name)
    write_tasks(folder / "tasks", ("red", "green"), train=8, test=4)
    (folder / "general.txt").write_text("the sea moves the weed\nthe weed holds fast\nred\ngreen is not red\n")
    source = {"path": str(folder / "general.txt"), "count": 2}
    method = [m | source if isinstance(m, dict) and m["name"].startswith("gere") else m for m in method]
    return tiny_config(
        folder,
        tuner=TUNERS[tuner],
        method=method,
        stream={"path": str(folder / "tasks"), "order": ["red", "green"]},
        training={"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "save_every": 100},
        evaluation={"max_new_tokens": 2, "bootstrap": 0},
    )


def check_run(folder: Path, name: str, tuner: str, method: str) -> None:
    """It runs; a teacher agrees with itself at first, and not later; what is saved goes on here and loads elsewhere."""
    config = run_config(folder, name, tuner, METHODS[method])
    matrix = run(config, Progress(quiet=True))
    assert len(matrix["scores"]) == 3 and all(None not in row for row in matrix["scores"])
    named = [m if isinstance(m, str) else m["name"] for m in METHODS[method]]
    events = read_jsonl(folder / "run" / "events.jsonl")
    for kept in (term for term in named if term.startswith("gere")):
        assert events[0]["terms"][kept] == pytest.approx(0, abs=1e-5)
        assert events[-1]["terms"][kept] > 1e-4
    assert set(named) <= set(events[-1]["terms"])

    stage = folder / "run" / "stages" / "02-green"
    setup = prepare(resolve(load_config(config)))
    here = load_model(setup)
    setup.tuner.load(here, stage / setup.tuner.folder)
    assert trained_weights(here) == read_json(stage / "stage.json")["weights"]
    if tuner == "full":
        elsewhere = AutoModelForCausalLM.from_pretrained(stage / "model")
    else:
        start = AutoModelForCausalLM.from_pretrained(folder / "model")
        elsewhere = PeftModel.from_pretrained(start, stage / "adapter")
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=random_ids()).logits for model in (elsewhere, here))
        before = family_model(name)(input_ids=random_ids()).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "qwen3_moe" else pytest.mark.slow) for n in FAMILIES],
)
def test_run(tmp_path, name):
    check_run(tmp_path, name, "lora", "all")


@pytest.mark.slow
@families
@tuned
@pytest.mark.parametrize("method", METHODS)
def test_every_tuner_with_every_kind_of_method(tmp_path, name, tuner, method):
    check_run(tmp_path, name, tuner, method)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "mixtral" else pytest.mark.slow) for n in FAMILIES])
def test_a_stopped_full_run_goes_on(name, tmp_path, monkeypatch):
    """Some families' weights have other names and shapes in files than in memory."""
    write_family(tmp_path / "model", name)
    write_tasks(tmp_path / "tasks", ("red", "green"), train=16, test=2)
    steps = {"max_steps": 3, "save_every": 2, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1, "warmup": 0}
    stream = {"path": str(tmp_path / "tasks"), "order": ["red", "green"]}
    check_goes_on(tiny_config(tmp_path, stream=stream, training=steps), tmp_path, monkeypatch, "02-green")
