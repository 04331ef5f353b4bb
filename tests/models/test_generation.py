"""Greedy generation: the same tokens whatever the batch, with cache or without, and nothing left changed."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast import tuners
from holdfast.models.generation import generate, inference
from support.families import FAMILIES, family_model

torch.set_num_threads(1)  # models this small lose time to threads

VOCAB, EOS, PAD = 64, 2, 0


def tiny_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.3,  # far from uniform logits, so that the likeliest token is no matter of rounding
            eos_token_id=EOS,
            **options,
        )
    ).eval()


def some_prompts(n: int = 21, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 30))] for _ in range(n)]


def plain_greedy(model, prompt: list[int], max_new_tokens: int, eos: list[int]) -> list[int]:
    """One prompt, no cache, no padding."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            token = int(model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, -1].argmax())
            if token in eos:
                break
            new.append(token)
    return new


def run(model, prompts: list[list[int]], **options) -> list[list[int]]:
    arguments = {"max_new_tokens": 12, "batch_size": 4, "eos_token_ids": [EOS], "pad_token_id": PAD} | options
    return generate(model, prompts, **arguments)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_equals_a_plain_loop_for_every_batch_size(model, batch_size: int):
    prompts = some_prompts()
    # With five end tokens, some responses end early and some do not.
    eos = [EOS, 5, 11, 17, 23]
    expected = [plain_greedy(model, prompt, 12, eos) for prompt in prompts]
    assert {len(response) < 12 for response in expected} == {True, False}
    assert run(model, prompts, batch_size=batch_size, eos_token_ids=eos) == expected


def beginning_alike(vocabulary: int = VOCAB) -> list[list[int]]:
    """Prompts with one of two instructions before them, or with none; one is nothing but its instruction."""
    rng = random.Random(7)
    first, second = ([rng.randrange(3, vocabulary) for _ in range(n)] for n in (40, 45))
    return [
        *(first + [rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 12))] for _ in range(9)),
        *(second + [rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 12))] for _ in range(8)),
        first,
        *([rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 12))] for _ in range(5)),
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("mistral", "gpt_neox") else pytest.mark.slow) for n in sorted(FAMILIES)]
)
def test_what_prompts_begin_with_in_common_is_read_once(name):
    model = family_model(name)
    prompts = beginning_alike(model.config.vocab_size)
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, given, output: read.append(given[0].numel())
    )
    found = run(model, prompts, batch_size=5)
    hook.remove()
    assert found == [plain_greedy(model, prompt, 12, [EOS]) for prompt in prompts]
    saves = name not in ("gemma2", "gemma3", "mistral")  # whose windows are counted in places, padding too
    assert (sum(read) < sum(map(len, prompts))) == saves, "all that is generated is less than what is not read again"


@pytest.mark.parametrize("name", ["dual_prefix", "moe_lora"])
def test_it_is_so_with_tuners_that_change_attention_or_route_tokens(name):
    tuned: Any = tuners.find(name)().prepare(tiny_llama()).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    prompts = beginning_alike()
    assert run(tuned, prompts, batch_size=5) == [plain_greedy(tuned, prompt, 12, [EOS]) for prompt in prompts]


def test_padding_may_be_any_token_even_the_end_token(model):
    prompts = some_prompts()
    expected = run(model, prompts)
    assert run(model, prompts, pad_token_id=EOS) == expected
    assert run(model, prompts, pad_token_id=7) == expected


def test_an_end_token_at_once_is_an_empty_response(model):
    prompt = some_prompts(1)[0]
    first = plain_greedy(model, prompt, 1, [])
    assert run(model, [prompt], eos_token_ids=first) == [[]]


def test_without_end_tokens_every_response_is_full(model):
    assert {len(response) for response in run(model, some_prompts(), eos_token_ids=[])} == {12}


def test_no_prompts(model):
    assert run(model, []) == []


def test_the_models_own_generation_settings_do_not_apply_and_stay(model):
    prompts = some_prompts()
    expected = run(model, prompts)
    other = tiny_llama()
    own = other.generation_config
    own.update(do_sample=True, temperature=3.0, top_k=3, top_p=0.5, repetition_penalty=2.0, no_repeat_ngram_size=1)
    own.update(suppress_tokens=[response[0] for response in expected if response], max_length=5, min_new_tokens=3)
    before = own.to_dict()

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert run(other, prompts) == expected
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert messages == []
    assert other.generation_config is own
    assert own.to_dict() == before


def test_a_peft_model_answers_with_its_adapter():
    base = tiny_llama()
    prompts = some_prompts()
    without = run(base, prompts)
    peft_model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    own = base.generation_config
    own.update(do_sample=True, temperature=5.0)
    expected = [plain_greedy(peft_model.eval(), prompt, 12, [EOS]) for prompt in prompts]
    assert expected != without
    peft_model.train()
    assert run(peft_model, prompts) == expected
    assert base.generation_config is own
    assert peft_model.generation_config is own
    assert peft_model.training
    assert base.training


def test_cache_is_used_even_where_training_turned_it_off():
    model = tiny_llama(use_cache=False, attention_dropout=0.5)
    prompts = some_prompts()
    expected = run(model, prompts)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.train()
    widths: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    assert run(model, prompts, batch_size=len(prompts)) == expected
    hook.remove()
    assert widths == [max(map(len, prompts))] + [1] * (len(widths) - 1)
    assert model.config.use_cache is False


def test_training_goes_on_as_if_nothing_had_happened():
    """Modes, random states and gradients of a training step are the same with and without generation before it."""

    def gradients(measure: bool) -> list[torch.Tensor]:
        model = tiny_llama(attention_dropout=0.5)
        model.train()
        model.model.layers[0].eval()  # a part that its owner keeps in eval mode
        torch.manual_seed(3)
        if measure:
            run(model, some_prompts())
        assert model.training
        assert model.model.layers[1].self_attn.training
        assert not model.model.layers[0].self_attn.training
        ids = torch.tensor(some_prompts(1, seed=4))
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for measured, unmeasured in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(measured, unmeasured)


def test_random_states_are_untouched(model):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    run(model, some_prompts())
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_on_batch_counts_and_may_stop():
    model = tiny_llama().train()
    own = model.generation_config
    counts: list[int] = []
    prompts = [[3 + i] * 7 for i in range(10)]
    run(model, prompts, batch_size=4, on_batch=lambda done, total: counts.append(done))
    assert counts == [4, 8, 10]

    def stop(done: int, total: int) -> None:
        counts.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, prompts, batch_size=4, on_batch=stop)
    assert counts == [4, 8, 10, 4]
    assert model.training
    assert model.generation_config is own
    assert not torch.is_inference_mode_enabled()


def test_inference_restores_modes_after_an_error(model):
    model.train()
    with pytest.raises(RuntimeError, match="stop"), inference(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
        raise RuntimeError("stop")
    assert all(module.training for module in model.modules())
    model.eval()
