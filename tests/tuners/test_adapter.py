"""Bottleneck adapters: nothing changes before training, and each placement is what its paper draws."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import holdfast.runner.run
from holdfast.config.run import load_config
from holdfast.config.section import Named
from holdfast.errors import ConfigError
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from holdfast.tuners import build
from holdfast.tuners.adapter import Adapter, AdapterConfig
from support import peft_contract as contract
from support.hints import hinted_config, hinted_model
from support.pages import defaults
from support.paths import DOCS
from support.peft_contract import INPUTS, base, fill, logits
from support.tiny import VOCABULARY, tiny_model

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make(**options):
    return AdapterConfig(**{"task_type": "CAUSAL_LM", "bottleneck": 6} | options)


@pytest.fixture(params=PLACEMENTS)
def placed(request):
    return partial(make, placement=request.param)


def test_before_training_it_is_the_base_model(placed):
    contract.begins_at_the_base_model(placed)


def test_it_can_begin_random_as_peft_s_own_tests_need_it(placed):
    contract.begins_elsewhere_where_asked_to(placed)


def test_it_alone_is_trained(placed):
    contract.trains_its_own_parameters_and_all_of_them(placed, "adapter_")


def test_it_is_saved_and_loaded(placed, tmp_path):
    contract.is_saved_and_loaded(placed, tmp_path)


def test_a_fresh_process_loads_it(tmp_path):
    contract.is_loaded_in_a_fresh_process(make, "holdfast.tuners.adapter", tmp_path)


def test_it_can_be_switched_off(placed):
    contract.can_be_switched_off(placed)


def test_several_in_one_model():
    contract.can_be_one_of_several(make, partial(make, placement="parallel", bottleneck=3, non_linearity="tanh"))


def test_it_is_not_merged():
    contract.says_why_it_cannot_be_merged(make, r"non-linearity stands between .* unload\(\)")


def test_gradient_checkpointing(placed):
    contract.works_with_gradient_checkpointing(placed)


def test_bfloat16(placed):
    contract.works_in_bfloat16(placed)


def test_generation(placed):
    contract.generates(placed)


def test_layer_norms_can_be_trained_too(tmp_path):
    contract.trains_other_modules_in_full(make, tmp_path)


def by_hand(model, placement):
    """The Llama's forward pass written out, with the adapters where the papers put them."""
    inner = model.get_base_model().model
    act = F.gelu if placement == "houlsby" else F.relu
    scale = 4.0 if placement == "parallel" else 1.0

    def bottleneck(layer, x):
        down, up = layer.adapter_down["default"], layer.adapter_up["default"]
        return scale * (act(x @ down.weight.T + down.bias) @ up.weight.T + up.bias)

    def own(module):
        return getattr(module, "base_layer", module)

    hidden = inner.embed_tokens(INPUTS["input_ids"])
    tokens = hidden.shape[1]
    position = inner.rotary_emb(hidden, torch.arange(tokens)[None])
    future = torch.full((tokens, tokens), float("-inf")).triu(1)
    mask = future + torch.where(INPUTS["attention_mask"][:, None, None] > 0, 0.0, float("-inf"))
    for block in inner.layers:
        x = block.input_layernorm(hidden)
        h = own(block.self_attn)(x, position_embeddings=position, attention_mask=mask)[0]
        if placement == "houlsby":
            h = h + bottleneck(block.self_attn, h)
        hidden = hidden + h
        x = block.post_attention_layernorm(hidden)
        h = own(block.mlp)(x)
        hidden = hidden + h + bottleneck(block.mlp, x if placement == "parallel" else h)
    return inner.norm(hidden) @ model.get_output_embeddings().weight.T


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_forward_pass_by_hand(placement):
    model = fill(get_peft_model(base(), make(placement=placement)))
    seen = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(by_hand(model, placement)[seen], logits(model)[seen], rtol=1e-4, atol=1e-4)


def test_scale_and_non_linearity_and_dropout():
    once, twice = (fill(get_peft_model(base(), make(scale=s, target_modules=["layers.1.mlp"]))) for s in (1.0, 2.0))
    layer = {scale: model.get_base_model().model.layers[1].mlp for scale, model in ((1, once), (2, twice))}
    x = torch.randn(3, 16)
    update = {scale: found(x) - found.base_layer(x) for scale, found in layer.items()}
    torch.testing.assert_close(update[2], 2 * update[1], rtol=1e-4, atol=1e-5)
    linear = get_peft_model(base(), make(non_linearity="linear", target_modules=["layers.1.mlp"]))
    tuned = fill(linear).get_base_model().model.layers[1].mlp
    change = [tuned(factor * x) - tuned.base_layer(factor * x) for factor in (0, 1)]
    h = tuned.base_layer(x)
    product = tuned.adapter_up["default"].weight @ tuned.adapter_down["default"].weight
    torch.testing.assert_close(change[1] - change[0], h @ product.T, rtol=1e-3, atol=1e-4)
    dropped = fill(get_peft_model(base(), make(dropout=0.5)))
    assert torch.equal(logits(dropped), logits(dropped))
    dropped.train()
    assert not torch.equal(logits(dropped), logits(dropped))


MODELS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**SIZES, **TOKENS), ["attn", "mlp"]),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, **TOKENS, intermediate_size=32), ["attention", "mlp"]),
    "opt": (OPTForCausalLM, OPTConfig(**SIZES, **TOKENS, ffn_dim=32, word_embed_proj_dim=16), ["self_attn", "fc2"]),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SIZES, **TOKENS, intermediate_size=32, num_key_value_heads=2, num_local_experts=4),
        ["self_attn", "mlp"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_mlp_are_found(name):
    """Sub-modules of very different names, and a block without a module for its MLP (OPT)."""
    cls, config, expected = MODELS[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    before = logits(model)
    prepared = Adapter(bottleneck=4).prepare(model).eval()
    found = prepared.base_model.targeted_module_names
    assert [module.rpartition(".")[2] for module in found] == 2 * expected
    torch.testing.assert_close(logits(prepared), before, rtol=0, atol=1e-5)
    assert (logits(fill(prepared)) - before).abs().amax() > 1e-3


def test_target_modules_can_be_named():
    """Houlsby's place written as the last projections of attention and MLP; and all but one block."""
    named = fill(get_peft_model(base(), make(target_modules=["o_proj", "down_proj"])))
    found = fill(get_peft_model(base(), make()))
    torch.testing.assert_close(logits(named), logits(found), rtol=1e-4, atol=1e-5)
    first = get_peft_model(base(), make(target_modules=r".*layers\.0\.mlp"))
    assert first.base_model.targeted_module_names == ["model.layers.0.mlp"]
    without = get_peft_model(base(), make(exclude_modules=["layers.0.mlp", "layers.1.self_attn"]))
    assert without.base_model.targeted_module_names == ["model.layers.0.self_attn", "model.layers.1.mlp"]


def test_defaults_are_those_of_the_papers():
    by_placement = {p: AdapterConfig(placement=p) for p in PLACEMENTS}
    assert {p: (c.non_linearity, c.scale, c.bottleneck) for p, c in by_placement.items()} == {
        "houlsby": ("gelu", 1.0, 64),
        "pfeiffer": ("relu", 1.0, 64),
        "parallel": ("relu", 4.0, 64),
    }
    options = Adapter.Options().model_dump()
    assert PeftConfig.from_peft_type(peft_type="ADAPTER", **options) == AdapterConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placment": "houlsby"}, "did you mean 'placement'"),
        ({"placement": "serial"}, "placement"),
        ({"bottleneck": 0}, "bottleneck"),
        ({"non_linearity": "gelo"}, "non_linearity: transformers has none called 'gelo'; did you mean 'gelu'"),
        ({"scale": 0}, "scale"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(Named(name="adapter", **options))


@pytest.mark.parametrize("options", [{"placement": "serial"}, {"bottleneck": 0}, {"non_linearity": "gelo"}])
def test_wrong_options_are_named_in_plain_peft(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        AdapterConfig(**options)


def test_wrong_targets_are_named():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(ConfigError, match=r"has no module in transformer\.h\.0 .* attention.*among: .*mlp"):
        Adapter().prepare(bloom)  # its modules add their output to the residual stream themselves
    with pytest.raises(ConfigError, match="v_proj maps 16 features to 8"):
        Adapter(target_modules=["v_proj"]).prepare(tiny_model())
    with pytest.raises(ConfigError, match="down_proj maps 32 features to 16, but an adapter"):
        Adapter(placement="parallel", target_modules=["down_proj"]).prepare(tiny_model())


@pytest.mark.slow
def test_two_stages(tmp_path):
    """A run learns both tasks, goes on from the last stage's adapter, and saves what plain PEFT loads."""
    config = hinted_config(tmp_path, "sequential", tuner={"name": "adapter", "bottleneck": 16})
    config["stream"]["order"] = ["green", "blue"]
    config["training"] |= {"learning_rate": 3e-2, "epochs": 8}
    holdfast.runner.run.run(config, Progress(quiet=True))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    for stage in (1, 2):
        first, *_, last = [event["loss"] for event in events if event["stage"] == stage]
        assert last < 0.5 * first
    setup = prepare(resolve(load_config(config)))
    folder = tmp_path / "run" / "stages" / "02-blue" / "adapter"
    own = holdfast.runner.load.load_model(setup)
    setup.tuner.load(own, folder)
    plain = PeftModel.from_pretrained(hinted_model(), str(folder)).eval()
    assert torch.equal(logits(plain), logits(own.eval()))
    assert any(p.requires_grad for p in own.parameters())


def test_the_page_names_the_defaults():
    page = DOCS / "tuners" / "adapter.md"
    assert defaults(page.read_text(encoding="utf-8"))["adapter"] == Adapter.Options().model_dump()
