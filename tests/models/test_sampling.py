"""Sampling: what is drawn has the model's own distribution, whatever the batch, the path and the cache."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare, kstest

from holdfast import tuners
from holdfast.config.section import Named
from holdfast.errors import ConfigError, DataError
from holdfast.models.cache import has_plain_decoder
from holdfast.models.sampling import BLOCK, Draw, sample
from support.families import FAMILIES, family_model
from support.tiny import VOCABULARY, tiny_model


def bigram(**changes):
    """A model whose logits depend on the last token alone: nothing is added to its embedding before the head."""
    model = tiny_model(tie_word_embeddings=False, **changes)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data.normal_(0, 0.4, generator=torch.Generator().manual_seed(1))
    return model


def transitions(model, temperature=1.0):
    """p(next | last), [vocab, vocab], from the model's own forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.arange(VOCABULARY)[:, None]).logits[:, 0]
    return (logits.double() / temperature).softmax(-1).numpy()


@pytest.mark.parametrize(
    ("use_cache", "temperature"),
    [(True, 0.7), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, 1.0), (False, 1.0), (False, 0.7)))],
)
def test_the_transitions_of_a_bigram_model_are_drawn_as_often_as_it_says(use_cache, temperature):
    """A chi-square test for every token after which something was drawn often, on 40,000 draws in all."""
    model = bigram()
    prompts = [[token % VOCABULARY] for token in range(1000)]
    found = sample(model, prompts, max_new_tokens=40, seed=0, temperature=temperature, use_cache=use_cache)
    counts = Counter(
        (a, b) for p, row in zip(prompts, found.tokens, strict=True) for a, b in zip(p + row, row, strict=False)
    )
    expected, tested = transitions(model, temperature), []
    for last in range(VOCABULARY):
        drawn = np.array([counts[last, token] for token in range(VOCABULARY)])
        likely = expected[last] * drawn.sum() >= 5
        if likely.sum() > 1 and not likely.all():
            pooled = [np.append(x[likely], x[~likely].sum()) for x in (drawn, expected[last] * drawn.sum())]
            tested.append(chisquare(*pooled, sum_check=False).pvalue)
    assert len(tested) > 50
    assert kstest(tested, "uniform").pvalue > 1e-3 and min(tested) > 1e-5, sorted(tested)[:5]


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    """Over a vocabulary of several blocks, beside a plain sum in float64; improbable tokens are reached at the ends."""
    logits = 4 * torch.randn(3, 3 * BLOCK + 7, generator=torch.Generator().manual_seed(0))
    logits[:, -5:] = -torch.inf
    uniform = torch.rand(3, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniform[:, :2] = torch.tensor([0.0, 1 - 2**-53])
    draw, p = Draw(uniform, 1.0), logits.double().softmax(-1)
    drawn = torch.cat([draw(logits) for _ in range(500)], dim=1)
    before = torch.nn.functional.pad(p.cumsum(-1), (1, 0))
    assert (before.gather(1, drawn) <= uniform + 1e-6).all() and (before.gather(1, drawn + 1) >= uniform - 1e-6).all()
    torch.testing.assert_close(torch.cat(draw.log_probs, dim=1), p.log().gather(1, drawn), rtol=0, atol=1e-5)
    assert (drawn[:, 0] == 0).all() and (drawn[:, 1] == logits.shape[1] - 6).all()


def test_top_p_draws_from_the_likeliest_tokens_alone_in_proportion():
    """Evenly spaced uniform numbers give each token its share of the nucleus, the fewest tokens that have top_p."""
    logits = 2 * torch.randn(2, BLOCK + 9, generator=torch.Generator().manual_seed(0))
    steps = 4000
    uniform = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).expand(2, steps)
    draw, p = Draw(uniform, 0.8, None, 0.6), (logits.double() / 0.8).softmax(-1)
    drawn = torch.cat([draw(logits) for _ in range(steps)], dim=1)
    for row, likely in zip(drawn, p, strict=True):
        order = likely.argsort(descending=True)
        nucleus = order[: int((likely[order].cumsum(0) < 0.6).sum()) + 1]
        counts = row.bincount(minlength=len(likely)).double() / steps
        expected = torch.zeros_like(likely).scatter(0, nucleus, likely[nucleus] / likely[nucleus].sum())
        torch.testing.assert_close(counts, expected, rtol=0, atol=1.5 / steps)
    own = logits.double().log_softmax(-1).gather(1, drawn)
    torch.testing.assert_close(torch.cat(draw.log_probs, dim=1), own, rtol=0, atol=1e-5)  # under the model


@pytest.fixture(scope="module")
def prompts():
    chance = random.Random(3)
    return [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in (1, 5, 2, 9, 5, 1, 3)]


def wide_model(**changes):
    """Not nearly uniform, so that a wrong mask or position shows."""
    return tiny_model(initializer_range=0.25, **changes)


def forward(model, row):
    """Last hidden states and log-probabilities of one row by itself."""
    with torch.no_grad():
        outputs = model(input_ids=torch.tensor([row]), output_hidden_states=True)
    return outputs.hidden_states[-1][0], outputs.logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_draws_what_its_forward_pass_says(family, prompts):
    """Rows of different lengths: states and log-probabilities are those of a forward pass of each row by itself, and
    the tokens those of generation without a cache, with the same numbers; beyond a sliding window, too."""
    model = family_model(family)
    found = sample(model, prompts, max_new_tokens=12, seed="a", hidden=True)
    assert has_plain_decoder(model)
    assert sample(model, prompts, max_new_tokens=12, seed="a", use_cache=False).tokens == found.tokens
    for prompt, new, log_p, hidden in zip(prompts, found.tokens, found.log_probs, found.hidden, strict=True):
        row = prompt + new
        states, log_probs = forward(model, row)
        torch.testing.assert_close(hidden, states[:-1], rtol=1e-3, atol=1e-3)
        own = log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(new)[:, None]).sum()
        assert log_p == pytest.approx(float(own), abs=1e-3)


def test_a_row_does_not_depend_on_the_others(prompts):
    model = wide_model()
    whole = sample(model, prompts, max_new_tokens=20, seed=4, hidden=True)
    for rows in ([3], [6, 2], [5, 4, 3, 2, 1, 0]):
        part = sample(model, [prompts[i] for i in rows], max_new_tokens=20, seed=4, numbers=rows, hidden=True)
        assert part.tokens == [whole.tokens[i] for i in rows]
        for one, i in zip(part.hidden, rows, strict=True):
            torch.testing.assert_close(one, whole.hidden[i], rtol=1e-4, atol=1e-5)
    other = sample(model, prompts, max_new_tokens=20, seed=5)
    assert all(a != b for a, b in zip(other.tokens, whole.tokens, strict=True))
    assert sample(model, prompts, max_new_tokens=20, seed=4, pad_token_id=7).tokens == whole.tokens


def test_a_stop_token_ends_a_row_and_belongs_to_it(prompts):
    model = wide_model()
    free = sample(model, prompts, max_new_tokens=20, seed=4)
    stops = {free.tokens[0][3], free.tokens[2][0]}
    for use_cache in (True, False):
        found = sample(
            model, prompts, max_new_tokens=20, seed=4, stop_token_ids=stops, hidden=True, use_cache=use_cache
        )
        for prompt, new, whole, hidden in zip(prompts, found.tokens, free.tokens, found.hidden, strict=True):
            end = next((i + 1 for i, token in enumerate(whole) if token in stops), 20)
            assert new == whole[:end]
            assert len(hidden) == len(prompt) + len(new) - 1
        own = forward(model, prompts[2] + found.tokens[2])[1][len(prompts[2]) - 1, found.tokens[2][0]]
        assert found.log_probs[2] == pytest.approx(float(own), abs=1e-5)


def test_all_stop_at_once():
    model = bigram()
    found = sample(model, [[5], [6, 7]], max_new_tokens=9, seed=0, stop_token_ids=range(VOCABULARY), hidden=True)
    assert [len(new) for new in found.tokens] == [1, 1] and [len(h) for h in found.hidden] == [1, 2]


ADAPTED = ["lora", "adapter", "moe_lora", "ia3", "prompt", "prefix", "p_tuning", "full"]


@pytest.mark.parametrize("tuner", ADAPTED)
def test_an_adapted_model_draws_as_its_forward_pass_says(tuner, prompts):
    built = tuners.build(Named(name=tuner))
    model = built.prepare(wide_model())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.eval()
    found = sample(model, prompts, max_new_tokens=10, seed=1, hidden=True)
    assert has_plain_decoder(model) == (tuner not in ("prompt", "prefix", "p_tuning"))
    for prompt, new, log_p, hidden in zip(prompts, found.tokens, found.log_probs, found.hidden, strict=True):
        states, log_probs = forward(model, prompt + new)
        torch.testing.assert_close(hidden, states[:-1], rtol=1e-3, atol=1e-3)
        own = log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(new)[:, None]).sum()
        assert log_p == pytest.approx(float(own), abs=1e-3)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_of_plain_peft(config):
    model = get_peft_model(wide_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    row = [5, 6, 7]
    found = sample(model, [row], max_new_tokens=8, seed=1, hidden=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row + found.tokens[0]])).logits[0, -9:-1]
    own = logits.double().log_softmax(-1).gather(1, torch.tensor(found.tokens[0])[:, None]).sum()
    assert found.log_probs[0] == pytest.approx(float(own), abs=1e-3)
    assert found.hidden[0].shape == (10, 16)


def test_an_adapter_on_the_head_counts():
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(wide_model(tie_word_embeddings=False), config).eval()
    found = sample(model, [[5]], max_new_tokens=8, seed=1)
    _, log_probs = forward(model, [5, *found.tokens[0]])
    own = log_probs[:-1].gather(1, torch.tensor(found.tokens[0])[:, None]).sum()
    assert found.log_probs[0] == pytest.approx(float(own), abs=1e-4)


def test_everything_is_left_as_it_was(prompts):
    expected = sample(wide_model(), prompts, max_new_tokens=20, seed=4).tokens
    model = wide_model(attention_dropout=0.5, use_cache=False).train()
    model.model.layers[0].eval()
    own = model.generation_config
    own.update(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=2.0, max_length=5)
    settings, config = own.to_dict(), model.config.to_dict()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for use_cache in (True, False):
        assert sample(model, prompts, max_new_tokens=20, seed=4, use_cache=use_cache).tokens == expected
    assert model.training and not model.model.layers[0].training and model.model.layers[1].self_attn.training
    assert model.generation_config is own and own.to_dict() == settings and model.config.to_dict() == config
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ConfigError, match="temperature: 0 cannot divide logits"):
        sample(tiny_model(), [[1]], max_new_tokens=2, seed=0, temperature=0)
    broken = tiny_model()
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        sample(broken, [[1]], max_new_tokens=2, seed=0)
    assert sample(tiny_model(), [], max_new_tokens=2, seed=0).tokens == []
