"""Soft prompts do not show: the model with them answers, learns and is measured as one without, only better."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import holdfast.runner.run
from holdfast.config.run import load_config
from holdfast.config.section import Named
from holdfast.data.collate import Collator, pack
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.models.cache import cache_name, cache_of
from holdfast.models.generation import generate
from holdfast.models.head import base
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from holdfast.tuners import build
from holdfast.tuners.prompt_tuning import PromptTuning
from support.hints import hinted_config
from support.tiny import VOCABULARY, pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage, tiny_tokenizer

VIRTUAL = 5


def llama():
    """Weights so large that every token matters, not the last one alone."""
    return tiny_model(initializer_range=0.3, tie_word_embeddings=False)


def gpt2():
    """Learned positions, which start from 0 with the first prompt."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.3, tie_word_embeddings=False))


def opt():
    """Positions with an offset, taken from the mask where none are given."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return OPTForCausalLM(OPTConfig(**sizes, **tokens, dropout=0.0, init_std=0.3))


MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}


@pytest.fixture(params=MODELS)
def model(request):
    prepared = PromptTuning(num_virtual_tokens=VIRTUAL, prompt_tuning_init="RANDOM").prepare(MODELS[request.param]())
    return prepared.eval()


def explicitly(model, row, **options):
    """One row without padding, its prompts put before its embeddings by hand."""
    base = model.get_base_model()
    prompts = model.prompt_encoder["default"].embedding.weight[None]
    embeds = torch.cat([prompts, base.get_input_embeddings()(torch.tensor([row]))], dim=1)
    with model.disable_adapter():
        return base(inputs_embeds=embeds, **options)


def left_padded(rows):
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return torch.tensor([[0] * (width - len(row)) + row for row in rows]), mask


@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_are_those_of_explicit_embeddings_without_the_prompts(model, side):
    rows = tiny_rows(5, length=12)
    prompts = [row["input_ids"] for row in rows]
    ids, mask = (pad_rows(rows)[key] for key in ("input_ids", "attention_mask"))
    if side == "left":
        ids, mask = left_padded(prompts)
    outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert outputs.logits.shape == (*ids.shape, VOCABULARY)
    for number, row in enumerate(prompts):
        expected = explicitly(model, row, output_hidden_states=True)
        own = mask[number].bool()
        torch.testing.assert_close(outputs.logits[number, own], expected.logits[0, VIRTUAL:], rtol=1e-4, atol=1e-5)
        for found, wanted in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            assert found.shape[1] == ids.shape[1]
            torch.testing.assert_close(found[number, own], wanted[0, VIRTUAL:], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids, attention_mask=mask).logits, outputs.logits, atol=1e-3)


def test_the_loss_is_the_mean_over_supervised_tokens_and_never_over_a_first_token(model):
    batch = pad_rows(tiny_rows(5))
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)  # the first ones too
    outputs = model(**batch)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(
        model(**batch, num_items_in_batch=7).loss * 7, expected * (batch["labels"][:, 1:] >= 0).sum()
    )


def test_some_logits_may_be_kept(model):
    batch = pad_rows(tiny_rows(3))
    del batch["labels"]
    every = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, every[:, -1:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([1, 2])).logits, every[:, 1:3])


def greedy(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(explicitly(model, ids).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_generation_equals_a_plain_loop_without_cache_or_padding(model, batch_size):
    prompts = [row["input_ids"] for row in tiny_rows(7, seed=3, length=14)]
    widths: list[int] = []
    hook = model.get_base_model().lm_head.register_forward_hook(lambda m, i, output: widths.append(output.shape[1]))
    found = generate(model, prompts, max_new_tokens=6, batch_size=batch_size, eos_token_ids=[], pad_token_id=0)
    hook.remove()
    assert found == [greedy(model, prompt, 6) for prompt in prompts]
    assert widths.count(1) >= 5  # the cache is used


def test_sampling_beams_and_a_loop_with_a_cache_of_ones_own_work(model):
    ids, mask = left_padded([row["input_ids"] for row in tiny_rows(3, seed=2)])
    beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=3, max_new_tokens=4, do_sample=False)
    uncached = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=3, max_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(beams, uncached)
    row = tiny_rows(1, seed=5)[0]["input_ids"]
    first = model(input_ids=torch.tensor([row[:-1]]), use_cache=True)
    cache = {cache_name(base(model)): cache_of(first)}
    last = model(input_ids=torch.tensor([row[-1:]]), **cache)
    torch.testing.assert_close(last.logits[0, -1], explicitly(model, row).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_without_the_adapter_it_is_the_base_model(model):
    plain = copy.deepcopy(model.get_base_model())
    for hooks in (plain._forward_pre_hooks, plain._forward_hooks):
        hooks.clear()
    batch, prompts = pad_rows(tiny_rows(4)), [row["input_ids"] for row in tiny_rows(4)]
    options = {"max_new_tokens": 4, "batch_size": 4, "eos_token_ids": [], "pad_token_id": 0}
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
        assert generate(model, prompts, **options) == generate(plain, prompts, **options)
    assert generate(model, prompts, **options) != generate(plain, prompts, **options)


def test_a_copy_has_prompts_of_its_own(model):
    batch = pad_rows(tiny_rows(4))
    other = copy.deepcopy(model)
    before = model(**batch).logits
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.mul_(-1)
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
    assert not torch.allclose(other(**batch).logits, before)


def test_only_the_prompt_is_trained_and_its_gradient_is_that_of_explicit_embeddings(model):
    assert list(weights(model).tensors) == ["prompt_encoder.default.embedding.weight"]
    rows = tiny_rows(5)
    found = tiny_stage(model, rows, micro_batch_size=2).gradient(rows)
    total, count = 0, 0
    for row in rows:
        logits = explicitly(model, row["input_ids"]).logits[0, VIRTUAL:]
        labels = torch.tensor(row["labels"])
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    prompt = model.prompt_encoder["default"].embedding.weight
    assert float(prompt.grad.abs().max()) > 1e-4
    torch.testing.assert_close(next(iter(found)), prompt.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    batch, prompt = pad_rows(tiny_rows(5)), model.prompt_encoder["default"].embedding.weight
    model.train()
    model(**batch, use_cache=False).loss.backward()
    expected, prompt.grad = prompt.grad, None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**batch, use_cache=False).loss.backward()
    torch.testing.assert_close(prompt.grad, expected)


def test_hidden_states_of_a_stage_are_those_of_the_rows(model):
    rows = tiny_rows(5)
    for row, hidden in zip(rows, tiny_stage(model, rows, micro_batch_size=2).hidden_states(rows), strict=True):
        expected = explicitly(model, row["input_ids"], output_hidden_states=True).hidden_states[-1][0, VIRTUAL:]
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_refused(model):
    batch = Collator(0)(pack(tiny_rows(4), 32))
    with pytest.raises(ConfigError, match="packing"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_loads_with_plain_peft_and_gives_the_same_logits(name, tmp_path):
    tuner = PromptTuning(num_virtual_tokens=VIRTUAL, prompt_tuning_init="RANDOM")
    model = tuner.prepare(MODELS[name]()).eval()
    tuner.save(model, tmp_path)
    plain = PeftModel.from_pretrained(MODELS[name](), str(tmp_path)).eval()
    other = tuner.prepare(MODELS[name]()).eval()
    tuner.load(other, tmp_path)
    batch = pad_rows(tiny_rows(4))
    logits = model(**batch).logits
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(plain(**batch).logits[:, VIRTUAL:][kept], logits[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(other(**batch).logits, logits)
    assert other.prompt_encoder["default"].embedding.weight.requires_grad


def test_beginnings(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    base = tiny_model()
    base.config._name_or_path = base.name_or_path = str(tmp_path)
    table = base.get_input_embeddings().weight.detach()

    def begins(**options):
        prepared = build(Named(name="prompt", num_virtual_tokens=7, **options)).prepare(copy.deepcopy(base))
        return prepared.prompt_encoder["default"].embedding.weight.detach()

    assert all((row == table).all(1).any() for row in begins())
    assert not any((row == table).all(1).any() for row in begins(prompt_tuning_init="RANDOM"))
    text = begins(prompt_tuning_init="TEXT", prompt_tuning_init_text="red")
    assert torch.equal(text, table[tiny_tokenizer()("redredr", add_special_tokens=False)["input_ids"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokns": 3}, "did you mean 'num_virtual_tokens'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
        ({"prompt_tuning_init_text": "red"}, "prompt_tuning_init TEXT"),
        ({"task_type": "SEQ_CLS"}, "task_type: unknown key"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(Named(name="prompt", **options))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lwf", "replay", "a_gem", "ewc"])
def test_other_methods_work_on_it(method, tmp_path):
    """Rehearsal rows, references, teachers and Fisher matrices are made by the model with its prompt."""
    config = hinted_config(tmp_path, method, tuner="prompt")
    config["stream"]["order"] = ["green", "blue"]
    holdfast.runner.run.run(config, Progress(quiet=True))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    for stage, share in ((1, 0.5), (2, 1.0)):
        first, *_, last = [event for event in events if event["stage"] == stage]
        terms = {name: value for name, value in last["terms"].items() if not name.startswith("a_gem/")}
        assert last["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)
        assert last["terms"]["task"] < share * first["terms"]["task"]
    assert method in last["terms"] or method == "a_gem"


def test_the_prompt_takes_its_place_in_the_context(tmp_path):
    config = tiny_config(tmp_path, tuner={"name": "prompt", "num_virtual_tokens": VIRTUAL})
    assert prepare(resolve(load_config(config))).max_length == 128 - VIRTUAL
    config["data"] = {"max_length": 126}
    with pytest.raises(ConfigError, match=r"data\.max_length: 126 is more than the model's context of 123"):
        prepare(resolve(load_config(config)))
    config["tuner"]["num_virtual_tokens"] = 128
    with pytest.raises(ConfigError, match="tuner: a soft prompt of 128"):
        prepare(resolve(load_config(config)))
