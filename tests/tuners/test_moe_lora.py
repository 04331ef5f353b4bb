"""MoE-LoRA: a weighted sum of experts, a router that is trained, and router losses that say what they mean."""

from __future__ import annotations

import json
import math
import signal
from functools import partial

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import holdfast.runner.run
from holdfast.api.stage import Step
from holdfast.config.run import load_config
from holdfast.config.section import Named
from holdfast.errors import ConfigError
from holdfast.methods import known
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from holdfast.training.trainer import ContinualTrainer
from holdfast.tuners import build
from holdfast.tuners.moe_lora import MoeLora, MoeLoraConfig, MoeLoraLinear, RouterLosses
from holdfast.tuners.moe_lora.layer import gates
from holdfast.tuners.moe_lora.routing import load_balance, router_z
from support import peft_contract as contract
from support.hints import hinted_config, hinted_model
from support.pages import defaults
from support.paths import DOCS
from support.peft_contract import base, fill, logits
from support.resumed import finish, results, start
from support.tiny import VOCABULARY, pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage

VARIANTS = (None, 1, 2)


def make(**options):
    return MoeLoraConfig(**{"task_type": "CAUSAL_LM", "r": 8, "lora_dropout": 0.0} | options)


@pytest.fixture(params=VARIANTS)
def routed(request):
    return partial(make, top_k=request.param)


def test_before_training_it_is_the_base_model(routed):
    contract.begins_at_the_base_model(routed)


def test_it_can_begin_random_as_peft_s_own_tests_need_it(routed):
    contract.begins_elsewhere_where_asked_to(routed)


def test_it_alone_is_trained(routed):
    contract.trains_its_own_parameters_and_all_of_them(routed, "moe_lora_")


def test_it_is_saved_and_loaded(routed, tmp_path):
    contract.is_saved_and_loaded(routed, tmp_path)


@pytest.mark.slow
def test_a_fresh_process_loads_it(tmp_path):
    contract.is_loaded_in_a_fresh_process(make, "holdfast.tuners.moe_lora", tmp_path)


def test_it_can_be_switched_off():
    contract.can_be_switched_off(make)


def test_several_in_one_model():
    contract.can_be_one_of_several(make, partial(make, r=6, experts=3, top_k=2, lora_alpha=4))


def test_it_is_not_merged():
    contract.says_why_it_cannot_be_merged(make, r"router weighs .* anew for each token.*unload\(\)")


def test_gradient_checkpointing(routed):
    contract.works_with_gradient_checkpointing(routed)


def test_bfloat16():
    contract.works_in_bfloat16(make)


def test_generation(routed):
    contract.generates(routed)


def test_other_modules_can_be_trained_too(tmp_path):
    contract.trains_other_modules_in_full(make, tmp_path)


@pytest.mark.parametrize("top_k", [*VARIANTS, 4])
def test_the_forward_pass_by_hand(top_k):
    """Token by token and expert by expert."""
    model = fill(get_peft_model(base(), make(top_k=top_k, lora_alpha=12)))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    a, b, w = (getattr(layer, f"moe_lora_{part}")["default"].weight.detach() for part in ("A", "B", "router"))
    assert w.shape == (4, 16) and a.shape == (8, 16) and b.shape == (16, 8)
    x = torch.randn(2, 3, 16)
    expected = layer.base_layer(x).detach().clone()
    for row in range(2):
        for token in range(3):
            scores = [float(w[i] @ x[row, token]) for i in range(4)]
            chosen = sorted(range(4), key=lambda i: -scores[i])[: top_k or 4]
            total = sum(math.exp(scores[i]) for i in (range(4) if top_k == 1 else chosen))
            for i in chosen:
                rank = slice(2 * i, 2 * i + 2)
                update = b[:, rank] @ (a[rank] @ x[row, token])
                expected[row, token] += math.exp(scores[i]) / total * 12 / 8 * update
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_gates():
    x = torch.randn(50, 5)
    assert torch.equal(gates(x, None), x.softmax(-1))
    torch.testing.assert_close(gates(x, 5), x.softmax(-1))
    two = gates(x, 2)
    assert ((two > 0).sum(-1) == 2).all()
    torch.testing.assert_close(two.sum(-1), torch.ones(50))
    one = gates(x, 1)
    torch.testing.assert_close(one.amax(-1), x.softmax(-1).amax(-1))
    assert ((one > 0).sum(-1) == 1).all()


def test_dropout_is_on_the_experts_input_alone():
    layer = fill(get_peft_model(base(), make(lora_dropout=0.5))).train().get_base_model().model.layers[0].mlp.up_proj
    seen = []
    layer.moe_lora_router["default"].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.randn(3, 16)
    assert not torch.equal(layer(x), layer(x))
    assert all(torch.equal(inputs, x) for inputs in seen)


def test_load_balance_by_hand():
    """Three tokens, two experts: probabilities (3/4, 1/4), (3/4, 1/4), (1/4, 3/4)."""
    odds = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]).log()
    # f = (2/3, 1/3), P = (7/12, 5/12): 2 (14/36 + 5/36) = 38/36
    assert load_balance(odds).item() == pytest.approx(38 / 36)
    assert load_balance(odds, 2).item() == pytest.approx(1.0)  # f = (1/2, 1/2)
    one_for_all = torch.tensor([[50.0, 0, 0, 0]]).expand(9, 4)
    assert load_balance(one_for_all).item() == pytest.approx(4.0)
    assert load_balance(torch.eye(4) * 3).item() == pytest.approx(1.0)
    x = torch.randn(40, 4)
    for k in (1, 2, 3):  # transformers' sums over the k choices
        assert load_balance(x, k).item() == pytest.approx(load_balancing_loss_func((x,), 4, k).item() / k, rel=1e-5)


def test_load_balance_has_the_gradient_of_the_probabilities():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    [gradient] = torch.autograd.grad(load_balance(x), x)
    step = 1e-6
    for token in range(6):
        for expert in range(3):
            moved = [x.detach().clone() for _ in range(2)]
            moved[0][token, expert] += step
            moved[1][token, expert] -= step
            slope = (load_balance(moved[0]) - load_balance(moved[1])) / (2 * step)
            assert gradient[token, expert].item() == pytest.approx(slope.item(), abs=1e-7)
    assert gradient.any()


def test_router_z_by_hand():
    x = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert router_z(x).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def expected_terms(model, rows, top_k=None):
    """The sums over all routers, from rows that went through the model one by one, without padding."""
    seen = {}
    hooks = [
        module.moe_lora_router["default"].register_forward_hook(
            lambda router, args, out, name=name: seen.setdefault(name, []).append(out[0])
        )
        for name, module in model.named_modules()
        if isinstance(module, MoeLoraLinear)
    ]
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]))
    for hook in hooks:
        hook.remove()
    pooled = [torch.cat(parts) for parts in seen.values()]
    assert len(pooled) == 14
    return sum(load_balance(x, top_k) for x in pooled), sum(router_z(x) for x in pooled)


def prepared(**options):
    return fill(get_peft_model(base(), make(**options))).train()


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_terms_are_those_of_the_tasks_rows_alone(top_k):
    """Neither padding, nor rehearsal rows in the same pass, nor other passes of any kind count."""
    model, rows = prepared(top_k=top_k), tiny_rows(7, seed=5)
    losses, stage = RouterLosses(balance=0.5, router_z=0.25), tiny_stage(model, rows)
    balance, z = expected_terms(model, rows[:4], top_k)
    losses.before_stage(stage)
    model(**pad_rows(rows))  # before the step
    step = Step(stage, 0, 4, 2, True)
    losses.extra_rows(step)
    for _ in range(2):  # micro-batches
        batch, joined = pad_rows(rows[:4]), pad_rows([*rows[:4], *tiny_rows(3, seed=8, length=20)])
        joined.pop("labels")
        model(**joined)
        model(**pad_rows(rows[4:]))  # rehearsal by itself
        terms = losses.loss_terms(step, batch, None)
        assert set(terms) == set(losses.declares(stage)) == {"moe_lora/balance", "moe_lora/router_z"}
        torch.testing.assert_close(terms["moe_lora/balance"], 0.5 * balance)
        torch.testing.assert_close(terms["moe_lora/router_z"], 0.25 * z)
        sum(terms.values()).backward()
    routers = [p for name, p in model.named_parameters() if "router" in name]
    assert all(p.grad is not None and p.grad.any() for p in routers)
    losses.after_stage(stage)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_terms_with_gradient_checkpointing():
    """The backward pass runs the routers once more; gradients are the same, and the next step's terms, too."""
    found = []
    for checkpointing in (False, True):
        model, batch = prepared(), pad_rows(tiny_rows(4))
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses, stage = RouterLosses(), tiny_stage(model, [])
        losses.before_stage(stage)
        for index in range(2):
            model.zero_grad()
            losses.extra_rows(Step(stage, index, 4, 1, True))
            loss = model(**batch).loss
            terms = losses.loss_terms(Step(stage, index, 4, 1, True), batch, None)
            (loss + sum(terms.values())).backward()
        found.append((terms, [p.grad for p in model.parameters() if p.requires_grad]))
    (plain, plain_gradients), (other, other_gradients) = found
    assert plain == other
    for one, two in zip(plain_gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, two)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    losses.extra_rows(Step(stage, 2, 4, 1, True))
    model(**batch)
    with pytest.raises(ConfigError, match="use_reentrant"):
        losses.loss_terms(Step(stage, 2, 4, 1, True), batch, None)


def test_layers_that_see_tokens_without_rows():
    """Qwen's shared expert gets [rows * tokens, hidden]."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **experts))
    target = ["shared_expert.up_proj"]
    model = fill(get_peft_model(model, make(target_modules=target))).train()
    [layer] = [m for m in model.modules() if isinstance(m, MoeLoraLinear)]
    seen, rows = [], tiny_rows(4)
    hook = layer.moe_lora_router["default"].register_forward_hook(lambda module, args, out: seen.append(out))
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]))
    hook.remove()
    assert seen[0].dim() == 2
    losses, stage = RouterLosses(), tiny_stage(model, rows)
    losses.before_stage(stage)
    losses.extra_rows(Step(stage, 0, 4, 1, True))
    model(**pad_rows(rows))
    terms = losses.loss_terms(Step(stage, 0, 4, 1, True), pad_rows(rows), None)
    torch.testing.assert_close(terms["moe_lora/balance"], 0.01 * load_balance(torch.cat(seen)))


def test_in_a_trainer_the_terms_are_logged_and_train_the_router(tmp_path):
    """One step of two micro-batches with the task's gradient kept from the routers by B = 0."""
    rows = [row | {"row": number} for number, row in enumerate(tiny_rows(4))]
    model = get_peft_model(base(), make())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "router" in name}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.1, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, max_grad_norm=0.0,
    )  # fmt: skip
    halves = []
    trainer = ContinualTrainer(
        model=model, args=arguments, train_dataset=rows, method=["sequential", RouterLosses(balance=2.0)],
        data_collator=lambda part: halves.append(part) or pad_rows(part),
    )  # fmt: skip
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "loss" in log]
    with torch.no_grad():
        for name, p in model.named_parameters():
            after = p.clone()
            if "router" in name:
                assert not torch.equal(after, before[name])
                p.copy_(before[name])
            elif "moe_lora_B" in name:
                p.zero_()  # so that the layers' inputs are those of the first step
        found = [expected_terms(model, half) for half in [part for part in halves if len(part) == 2][:2]]
    assert log["term/moe_lora/balance"] == pytest.approx(2.0 * sum(float(b) for b, _ in found) / 2, rel=1e-4)
    assert log["term/moe_lora/router_z"] == pytest.approx(0.001 * sum(float(z) for _, z in found) / 2, rel=1e-4)


def test_a_model_without_routers_is_refused():
    with pytest.raises(ConfigError, match="no active MoE-LoRA adapter"):
        RouterLosses().before_stage(tiny_stage(tiny_model(), []))


def test_the_companion_is_the_tuners_and_no_method():
    assert "moe_lora" not in known()
    assert MoeLora().companion().options.model_dump() == {"balance": 0.01, "router_z": 0.001}
    assert MoeLora(balance=0).companion().declares(None) == ("moe_lora/router_z",)
    assert MoeLora(balance=0, router_z=0).companion() is None
    assert PeftConfig.from_peft_type(peft_type="MOE_LORA").target_modules == "all-linear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": 4}, "did you mean 'experts'"),
        ({"r": 10}, "r: 10 cannot be split evenly among 4 experts; 8 would be the nearest"),
        ({"r": 2}, "r: 2 cannot be split evenly among 4 experts; 4 would"),
        ({"top_k": 5}, "top_k: 5 cannot be chosen from 4 experts"),
        ({"experts": 1}, "experts"),
        ({"balance": -1}, "balance"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(Named(name="moe_lora", **options))


@pytest.mark.parametrize("options", [{"r": 10}, {"r": 0}, {"top_k": 0}, {"experts": 1}])
def test_wrong_options_are_named_in_plain_peft(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        MoeLoraConfig(**options)


def test_a_target_that_is_no_linear_layer():
    with pytest.raises(ConfigError, match="self_attn is a LlamaAttention, not a linear layer"):
        MoeLora(target_modules=["self_attn"]).prepare(tiny_model())


@pytest.mark.slow
def test_two_stages(tmp_path):
    """A run with methods that make forward passes of their own: it learns, its losses are logged, and the companion is
    none of its methods."""
    tuner = {"name": "moe_lora", "r": 8, "top_k": 2, "balance": 0.02}
    config = hinted_config(tmp_path, ["replay", "a_gem"], tuner=tuner)
    config["stream"]["order"] = ["green", "blue"]
    config["training"] |= {"learning_rate": 2e-2, "epochs": 8}
    holdfast.runner.run.run(config, Progress(quiet=True))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    for stage in (1, 2):
        first, *_, last = [event for event in events if event["stage"] == stage]
        assert last["terms"]["task"] < 0.5 * first["terms"]["task"]
        assert last["loss"] == pytest.approx(sum(v for k, v in last["terms"].items() if "a_gem/" not in k), rel=1e-4)
        for event in (first, last):
            assert 14 * 0.02 <= event["terms"]["moe_lora/balance"] <= 14 * 4 * 0.02
            assert event["terms"]["moe_lora/router_z"] > 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [method["name"] for method in record["config"]["method"]] == ["replay", "a_gem"]
    setup = prepare(resolve(load_config(config)))
    assert [m.name for m in setup.methods] == ["replay", "a_gem"] and setup.applied[-1].name == "moe_lora"
    folder = tmp_path / "run" / "stages" / "02-blue" / "adapter"
    own = holdfast.runner.load.load_model(setup)
    setup.tuner.load(own, folder)
    plain = PeftModel.from_pretrained(hinted_model(), str(folder)).eval()
    assert torch.equal(logits(plain), logits(own.eval()))


@pytest.mark.slow
def test_killed_in_the_second_stage_and_continued(tmp_path):
    tuner = {"name": "moe_lora", "r": 8, "lora_dropout": 0.3}
    config = tiny_config(tmp_path, tuner=tuner, method="replay")
    config["stream"]["order"] = ["green", "blue"]
    config["training"] |= {"epochs": 4, "save_every": 4}
    files = {name: tmp_path / f"{name}.json" for name in ("whole", "broken")}
    for name, file in files.items():
        file.write_text(json.dumps(config | {"output": str(tmp_path / name)}))
    assert finish(start(files["whole"])) == 0
    assert finish(start(files["broken"], "step", 18)) == -signal.SIGKILL  # 12 steps a stage, a checkpoint each 4
    assert (tmp_path / "broken" / "stages" / "02-blue" / "checkpoint").is_dir()
    assert finish(start(files["broken"])) == 0
    assert results(tmp_path / "whole") == results(tmp_path / "broken")


def test_the_page_names_the_defaults():
    page = DOCS / "tuners" / "moe_lora.md"
    assert defaults(page.read_text(encoding="utf-8"))["moe_lora"] == MoeLora.Options().model_dump()
