"""DualPrompt and its tuner: prefixes by brute force, keys that find their task, and nothing of past tasks changed."""

from __future__ import annotations

import json
import math
import random
from string import ascii_lowercase

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TrainingArguments,
)

from holdfast import ContinualTrainer, run
from holdfast.api.stage import Step
from holdfast.api.task import Example, Turn
from holdfast.config.section import Named
from holdfast.data.collate import Collator
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.methods.dual_prompt import DualPrompt
from holdfast.models.generation import generate
from holdfast.models.likelihood import token_losses
from holdfast.tuners import build
from holdfast.tuners.dual_prefix import DualPrefix, DualPrefixModel
from support.tiny import VOCABULARY, pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage, tiny_tokenizer

TINY = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
ROPE = {"intermediate_size": 32, "max_position_embeddings": 128}


def prefixed(model=None, seed=0, scale=1.0, finished=0, **options):
    """A model with random prefixes, and as many finished tasks with other ones."""
    torch.manual_seed(seed)
    model = DualPrefix(**options).prepare(model or tiny_model(initializer_range=0.3))
    for _ in range(finished):
        randomise(model, scale)
        model.base_model.finish()
    return randomise(model, scale).eval()


def randomise(model, scale=1.0):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(scale * torch.randn_like(p))
    return model


def some_rows(count=5, seed=0, shortest=3, longest=11):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def padded(rows, left=False):
    width = max(map(len, rows))

    def put(row, fill):
        spare = [fill] * (width - len(row))
        return spare + row if left else row + spare

    ids = torch.tensor([put(row, 0) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([put([1] * len(row), 0) for row in rows])}


# --- the tuner ---


def plain_llama(model, ids, task=None):
    """Logits of one row, computed from the weights alone: a Llama that attends to [P_K; K] and [P_V; V]."""
    llama, config = model.get_base_model(), model.get_base_model().config
    n, heads, groups = len(ids), config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    dim = config.hidden_size // heads
    angles = torch.arange(n)[:, None] / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)

    def norm(x, layer):
        return layer.weight * x / (x.pow(2).mean(-1, keepdim=True) + layer.variance_epsilon).sqrt()

    def turned(x):  # pairs (i, i + dim / 2) of a head, rotated by position times frequency
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    x = llama.model.embed_tokens.weight[torch.tensor(ids)]
    for layer, prefix in zip(llama.model.layers, model.base_model.prefixes, strict=True):
        h, attention = norm(x, layer.input_layernorm), layer.self_attn.base_layer
        q, k, v = (
            p(h).view(n, -1, dim).transpose(0, 1) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = turned(q), turned(k)
        out = torch.zeros(n, heads * dim)
        for head in range(heads):
            keys = torch.cat([prefix.dual_prefix_keys["default"](task)[head // groups], k[head // groups]])
            values = torch.cat([prefix.dual_prefix_values["default"](task)[head // groups], v[head // groups]])
            for token in range(n):
                seen = len(keys) - n + token + 1  # the whole prefix and the tokens up to this one
                weights = (q[head, token] @ keys[:seen].T / math.sqrt(dim)).softmax(-1)
                out[token, head * dim : (head + 1) * dim] = weights @ values[:seen]
        x = x + attention.o_proj(out)
        h = norm(x, layer.post_attention_layernorm)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return llama.lm_head(norm(x, llama.model.norm))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_attention_is_that_over_prefix_and_own_keys_and_values_by_brute_force(attention, left):
    base = tiny_model(initializer_range=0.3, num_key_value_heads=1, num_hidden_layers=3)
    base.set_attn_implementation(attention)
    model = prefixed(base, finished=2, general_layers=1, general_length=3, expert_length=6)
    rows = some_rows()
    tasks = torch.tensor([1, 0, 1, 1, 0])
    for task in (None, 0, 1, tasks):
        with model.base_model.using(task):
            logits = model(**padded(rows, left)).logits
        assert logits.shape == (5, max(map(len, rows)), VOCABULARY)
        for i, row in enumerate(rows):
            own = logits[i, -len(row) :] if left else logits[i, : len(row)]
            expected = plain_llama(model, row, int(task[i]) if torch.is_tensor(task) else task)
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert (plain_llama(model, rows[0], 0) - plain_llama(model, rows[0], 1)).abs().max() > 0.1


@torch.no_grad()
def test_a_batch_without_padding_needs_no_mask_and_labels_give_the_usual_loss():
    model = prefixed()
    ids = torch.tensor([some_rows(1)[0]])
    expected = plain_llama(model, ids[0].tolist())
    torch.testing.assert_close(model(input_ids=ids).logits[0], expected, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(expected[:-1], ids[0, 1:])
    torch.testing.assert_close(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss, loss)


@torch.no_grad()
def test_generation_with_a_cache_equals_a_plain_loop_without():
    model = prefixed(finished=2)
    prompts = some_rows(9)

    def loop(prompt, task):
        new = []
        while len(new) < 8:
            new.append(int(plain_llama(model, prompt + new, task)[-1].argmax()))
        return new

    answers = {}
    for task in (None, 0, 1):
        with model.base_model.using(task):
            answers[task] = generate(model, prompts, max_new_tokens=8, batch_size=4, eos_token_ids=[], pad_token_id=0)
        assert answers[task] == [loop(prompt, task) for prompt in prompts]
    assert answers[0] != answers[1] != answers[None]
    # one batch in which each row has a task of its own
    tasks = torch.tensor([0, 1, 1])
    with model.base_model.using(tasks):
        tokens = model.generate(**padded(prompts[:3], left=True), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert tokens[:, -8:].tolist() == [answers[int(task)][i] for i, task in enumerate(tasks)]


ARCHITECTURES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=64)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TINY | ROPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TINY | ROPE, num_key_value_heads=1, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**TINY | ROPE, num_key_value_heads=1, head_dim=8, sliding_window=4)
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_other_architectures(name):
    torch.manual_seed(0)
    base = ARCHITECTURES[name]().eval()
    for p in base.parameters():
        if p.dim() > 1:
            p.mul_(5)
    rows = some_rows(4, longest=9)
    before = base(**padded(rows)).logits
    model = prefixed(base, finished=2, general_length=2, expert_length=3)
    assert len(model.base_model.prefixes) == 3
    real = padded(rows)["attention_mask"].bool()
    with model.disable_adapter():
        assert torch.equal(model(**padded(rows)).logits[real], before[real])
    tasks = torch.tensor([0, 1, 0, 1])
    with model.base_model.using(tasks):
        together = model(**padded(rows)).logits
    for i, row in enumerate(rows):
        with model.base_model.using(int(tasks[i])):
            alone = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(together[i, : len(row)], alone, rtol=1e-3, atol=1e-4)
        assert (alone - before[i, : len(row)]).abs().max() > 1e-2

    def loop(prompt):
        new = []
        while len(new) < 6:
            new.append(int(model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, -1].argmax()))
        return new

    found = generate(model, rows, max_new_tokens=6, batch_size=3, eos_token_ids=[], pad_token_id=0)
    assert found == [loop(row) for row in rows]


def test_rows_that_are_packed_into_one_sequence_do_not_see_each_other():
    model = prefixed()
    one, two = some_rows(2)
    with torch.no_grad():
        positions = torch.tensor([[*range(len(one)), *range(len(two))]])
        packed = model(input_ids=torch.tensor([one + two]), position_ids=positions, use_cache=False).logits[0]
        torch.testing.assert_close(packed[len(one) :], plain_llama(model, two), rtol=1e-4, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    def gradients(recompute):
        model = prefixed().train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = pad_rows(tiny_rows(4))
        model(**batch, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        if "task_key" not in name:
            torch.testing.assert_close(recomputed[name], gradient)
            assert gradient.abs().max() > 0


def test_prefixes_and_key_alone_are_trained_and_have_the_shapes_of_the_options():
    model = DualPrefix(general_length=4, expert_length=7).prepare(tiny_model(num_hidden_layers=6))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    place = "base_model.model.model.layers.{}.self_attn.dual_prefix_{}.default.now"
    expected = {place.format(5, "task_key"): (16,)}
    for i in range(6):
        expected |= {place.format(i, part): (1, 7 if i else 4, 8) for part in ("keys", "values")}
    assert shapes == expected

    def general(layers, **options):
        model = DualPrefix(**options).prepare(tiny_model(num_hidden_layers=layers))
        return sum(layer.dual_prefix_keys["default"].shared for layer in model.base_model.prefixes)

    assert [general(layers) for layers in (1, 2, 12)] == [0, 1, 2]  # the paper: 2 of 12
    assert general(4, general_layers=3) == 3 and general(4, general_layers=0) == 0


def test_what_takes_no_prefix_is_refused():
    with pytest.raises(ConfigError, match=r"tuner.general_layers: 2 of the model's 2 attention layers.*1 would be"):
        DualPrefix(general_layers=2).prepare(tiny_model())
    with pytest.raises(ConfigError, match=r"attention that hands its keys.*MambaForCausalLM"):
        DualPrefix().prepare(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)))
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"model.attention: prefixes work with eager and sdpa.*flash_attention_2"):
        DualPrefix().prepare(model)
    with pytest.raises(ConfigError, match="did you mean 'expert_length'"):
        build(Named(name="dual_prefix", expert_lenght=3))


@pytest.mark.parametrize("finished", [0, 2])
def test_saved_prefixes_load_with_all_finished_tasks(finished, tmp_path):
    tuner, model = DualPrefix(expert_length=5), prefixed(finished=finished, expert_length=5)
    tuner.save(model, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".md"}
    assert all(
        ".dual_prefix_" in name and "default" not in name for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    other = tuner.prepare(tiny_model(initializer_range=0.3))
    tuner.load(other, tmp_path)
    by_peft = PeftModel.from_pretrained(tiny_model(initializer_range=0.3), tmp_path)
    for loaded in (other, by_peft):
        assert loaded.base_model.tasks == finished
        own, its = model.state_dict(), loaded.state_dict()
        assert own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in own)


# --- the method ---


def task_rows(task, count=20, seed=0, answer=4):
    """Rows whose prompts are drawn from a third of the vocabulary, but for one token in ten."""
    generator = torch.Generator().manual_seed(100 * seed + task)

    def draw(size):
        own = torch.randint(4 + 20 * task, 24 + 20 * task, (size,), generator=generator)
        some = torch.randint(4, 64, (size,), generator=generator)
        return torch.where(torch.rand(size, generator=generator) < 0.9, own, some).tolist()

    sizes = torch.randint(12, 20, (count,), generator=generator).tolist()
    return [{"input_ids": [*draw(size), answer], "labels": [-100] * size + [answer]} for size in sizes]


def evaluation(model, methods, batch_size=4):
    return ModelEvaluation(model, Encoder(tiny_tokenizer(), max_length=128), batch_size=batch_size, methods=methods)


def trained(tmp_path, tasks=3, model=None, steps=4, **options):
    """A method after several stages with a Trainer, and what the model held after each."""
    model = model or DualPrefix(expert_length=5).prepare(tiny_model(initializer_range=0.3))
    method, after = DualPrompt(**options), []
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ContinualTrainer(
        model=model, args=arguments, train_dataset=task_rows(0), data_collator=Collator(0), method=method
    )
    for task in range(tasks):
        trainer.train_dataset = task_rows(task)
        trainer.train()
        after.append({name: t.clone() for name, t in model.state_dict().items()})
    return model, method, after


def test_prefixes_and_keys_of_finished_tasks_never_change_while_general_ones_do(tmp_path):
    model, _, after = trained(tmp_path)
    last = model.state_dict()
    for name in last:
        if name.endswith(".past"):
            for t, held in enumerate(after, start=1):
                assert len(held[name]) == t
                assert torch.equal(last[name][:t], held[name])
                assert torch.equal(held[name][-1], held[name.removesuffix("past") + "now"])
            assert not torch.equal(last[name][0], last[name][1])
        elif "layers.0.self_attn.dual_prefix_" in name:
            assert not torch.equal(after[0][name], after[1][name])
        elif not name.endswith(".now"):
            assert torch.equal(after[0][name], last[name])  # the model itself
    assert {name.rpartition(".")[2] for name in last if "1.self_attn.dual_prefix_" in name} == {"now", "past"}
    assert {name.rpartition(".")[2] for name in last if "0.self_attn.dual_prefix_" in name} == {"now"}


def test_the_key_finds_the_task_of_a_row(tmp_path):
    start = tiny_model(hidden_size=32, intermediate_size=64)
    model, method, _ = trained(tmp_path, model=DualPrefix().prepare(start), steps=15)
    tested = [row for task in range(3) for row in task_rows(task, 40, seed=1)]
    expected = [task for task in range(3) for _ in range(40)]
    tasks = method.tasks_of(evaluation(model, [method]), tested)
    right = sum(found == task for found, task in zip(tasks, expected, strict=True)) / len(tested)
    assert right > 0.95
    # the answer is not looked at, nor does it matter which rows share a batch
    other = [{**row, "input_ids": [*row["input_ids"][:-1], 63]} for row in tested]
    bare = [{"input_ids": row["input_ids"][:-1]} for row in tested]
    assert method.tasks_of(evaluation(model, [method], batch_size=7), other) == tasks
    assert method.tasks_of(evaluation(model, [method]), bare) == tasks


def test_each_row_is_answered_with_its_own_tasks_prefixes(tmp_path):
    model, method, _ = trained(tmp_path)
    randomise(model)  # what is in training now answers no row, but for the general prefixes
    rows = [task_rows(i % 3, 1, seed=i)[0] for i in range(12)]
    whole = evaluation(model, [method])
    tasks = method.tasks_of(whole, rows)
    assert set(tasks) == {0, 1, 2}
    losses, answered = {}, []
    for part in whole.parts(rows):
        answered += part
        found, _ = token_losses(model, [rows[i] for i in part], batch_size=4, pad_token_id=0)
        losses |= dict(zip(part, found, strict=True))
    assert sorted(answered) == list(range(12))
    for i, row in enumerate(rows):
        with torch.no_grad():
            log_p = plain_llama(model, row["input_ids"], tasks[i]).log_softmax(-1)
        assert losses[i] == pytest.approx(-float(log_p[-2, row["labels"][-1]]), rel=1e-4)


def test_at_test_leaves_the_model_as_it_was_and_begins_with_the_model_alone():
    model, rows, ids = prefixed(), task_rows(0, 4) + task_rows(1, 4), torch.tensor([[5, 6, 7]])
    method = DualPrompt()
    with torch.no_grad():
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
        for part in method.at_test(evaluation(model, [method]), rows):
            assert list(part) == list(range(8))
            assert torch.equal(model(input_ids=ids).logits, bare)
        for task in (0, 1):
            method.before_stage(tiny_stage(model, task_rows(task), task + 1))
            model.base_model.finish()
        now = randomise(model)(input_ids=ids).logits
        parts = method.at_test(evaluation(model, [method]), rows)
        assert 0 < len(next(parts)) < 8
        assert not torch.equal(model(input_ids=ids).logits, now)
        parts.close()
        assert torch.equal(model(input_ids=ids).logits, now)
    assert all(p.requires_grad == (".dual_prefix_" in name) for name, p in model.named_parameters())


def step_of(model, rows, micro_batches=1):
    return Step(tiny_stage(model, rows, micro_batch_size=3), 0, len(rows), micro_batches, True)


def test_the_keys_term_is_the_mean_distance_and_moves_the_current_key_alone():
    model, rows = prefixed(finished=2).train(), tiny_rows(6, length=12)
    method, key = DualPrompt(strength=0.7), model.base_model.key
    model.base_model.asks = True

    def term_of(part, micro_batches=1):
        batch = pad_rows(part)
        return method.loss_terms(step_of(model, rows, micro_batches), batch, model(**batch))["dual_prompt"]

    term = term_of(rows)
    assert model.training
    queries = []
    with torch.no_grad(), model.disable_adapter():
        for row in rows:
            before = [i for i, y in zip(row["input_ids"], row["labels"], strict=True) if y == -100]
            before = before if len(before) > 1 else row["input_ids"]
            hidden = model(input_ids=torch.tensor([before]), output_hidden_states=True).hidden_states[-1][0]
            queries.append(hidden.mean(0))
    expected = 0.7 * sum(1 - F.cosine_similarity(q, key.now, dim=0) for q in queries) / 6
    torch.testing.assert_close(term, expected)
    term.backward()
    assert key.now.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters() if p is not key.now)
    # finite differences
    direction, gradient = torch.randn(16), key.now.grad.clone()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            key.now.add_(sign * 1e-2 * direction)
            values.append(float(term_of(rows)))
            key.now.sub_(sign * 1e-2 * direction)
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(gradient @ direction), rel=2e-2)
    # micro-batches of any size add up to the same mean
    torch.testing.assert_close((term_of(rows[:1], 2) + term_of(rows[1:6], 2)) / 2, term)


def test_the_task_trains_the_prefixes_and_no_key():
    model = prefixed(finished=1).train()
    model(**pad_rows(tiny_rows(4))).loss.backward()
    for name, p in model.named_parameters():
        if "dual_prefix_" in name and "task_key" not in name:
            assert p.grad.abs().max() > 0
        else:
            assert p.grad is None or ("task_key" in name and not p.grad.any())


def test_a_stage_begins_at_the_last_ones_prefixes_and_at_a_key_of_its_own_rows():
    model, method = prefixed(), DualPrompt()
    one, again = tiny_stage(model, task_rows(0, 50), 1), tiny_stage(model, task_rows(0, 50), 1, micro_batch_size=7)
    before = {name: p.clone() for name, p in model.named_parameters() if "dual_prefix_keys" in name}
    method.before_stage(one)
    first = model.base_model.key.now.detach().clone()
    method.before_stage(again)
    torch.testing.assert_close(model.base_model.key.now.detach(), first)
    method.before_stage(tiny_stage(model, task_rows(1, 50), 2))
    assert F.cosine_similarity(first, model.base_model.key.now.detach(), dim=0) < 0.99
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_what_it_cannot_work_with_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = ContinualTrainer(
        model=tiny_model(), args=arguments, train_dataset=tiny_rows(4), data_collator=Collator(0), method="dual_prompt"
    )
    with pytest.raises(ConfigError, match=r"'dual_prompt': needs a model with prefixes.*dual_prefix"):
        trainer.train()
    with pytest.raises(ConfigError, match="strength"):
        DualPrompt(strength=-1)
    with pytest.raises(ConfigError, match="tuner: method 'dual_prompt' works with dual_prefix, not with 'lora'"):
        run(tiny_config(tmp_path, method="dual_prompt", tuner="lora"))
    with pytest.raises(ConfigError, match=r"data.packing: method 'dual_prompt'"):
        run(tiny_config(tmp_path, method="dual_prompt", tuner=None, data={"packing": True}))


# --- runs ---

ANSWERS = {"red": "b", "green": "r", "blue": "g"}


def questions(name, count, seed):
    chance = random.Random(f"{name}/{seed}")
    return [f"{name}: {chance.choice(ascii_lowercase)}{chance.choice(ascii_lowercase)}?" for _ in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three tasks that want another answer each, and a model that answers with the letter that a prompt begins with:
    frozen, it is always wrong, and a prefix can stand for the letter that it should find there."""
    folder = tmp_path_factory.mktemp("dual")
    made = tiny_config(folder, tuner=None, evaluation={"max_new_tokens": 3, "bootstrap": 0})
    for name, answer in ANSWERS.items():
        for split, count in (("train", 24), ("test", 8)):
            rows = [{"prompt": question, "answer": answer} for question in questions(name, count, split)]
            (folder / "tasks" / name / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    made["training"] |= {"epochs": 8, "learning_rate": 0.2}

    chance, encoder = random.Random(0), Encoder(tiny_tokenizer(), max_length=128)
    asked = [question for name in ANSWERS for question in questions(name, 24, "train")]
    model = tiny_model(hidden_size=32, intermediate_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        letters = [chance.choice("rgb") for _ in range(16)]
        turns = [(Turn("user", f"{c} {chance.choice(asked)}"), Turn("assistant", c)) for c in letters]
        model(**pad_rows(encoder.encode_all([Example("pretraining", 0, pair) for pair in turns]))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    return made


def short(config, **changes):
    """Two stages of six steps."""
    training = config["training"] | {"epochs": 2, "save_every": 4}
    return config | {"stream": config["stream"] | {"order": ["red", "green"]}, "training": training} | changes


def fingerprints(folder):
    return [json.loads(path.read_text())["weights"] for path in sorted(folder.glob("stages/*/stage.json"))]


def test_by_name_alone_it_learns_three_tasks_and_forgets_less_than_sequential(config, tmp_path):
    found = run(config | {"method": "dual_prompt", "output": str(tmp_path / "dual")})
    plain = run(config | {"tuner": "dual_prefix", "method": "sequential", "output": str(tmp_path / "sequential")})
    assert found["scores"][0] == [0, 0, 0]
    assert found["summary"]["new_task"] > 0.9 and plain["summary"]["new_task"] > 0.9
    assert found["summary"]["forgetting"] < 0.4 and plain["summary"]["forgetting"] > 0.8
    loaded = DualPrefix().prepare(AutoModelForCausalLM.from_pretrained(config["model"]))
    DualPrefix().load(loaded, tmp_path / "dual" / "stages" / "03-blue" / "adapter")
    assert isinstance(loaded.base_model, DualPrefixModel) and loaded.base_model.tasks == 3


def test_without_strength_it_is_sequential_bit_for_bit(config, tmp_path):
    off, plain = tmp_path / "off", tmp_path / "sequential"
    one = run(short(config, method={"name": "dual_prompt", "strength": 0}, output=str(off)))
    two = run(short(config, method="sequential", tuner="dual_prefix", output=str(plain)))
    assert one["scores"] == two["scores"]
    assert len(fingerprints(off)) == 2 and fingerprints(off) == fingerprints(plain)


def test_a_run_that_broke_off_in_its_second_stage_ends_as_an_unbroken_one(config, tmp_path, monkeypatch):
    config, original = short(config, method="dual_prompt"), DualPrompt.loss_terms
    whole = run(config | {"output": str(tmp_path / "whole")})

    def breaking(self, step, batch, outputs):
        if (step.stage.index, step.index) == (2, 5):
            raise KeyboardInterrupt
        return original(self, step, batch, outputs)

    broken = config | {"output": str(tmp_path / "broken")}
    with monkeypatch.context() as patch:
        patch.setattr(DualPrompt, "loss_terms", breaking)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    assert list((tmp_path / "broken").glob("stages/02-green/checkpoint/checkpoint-4"))
    assert run(broken) == whole
    assert fingerprints(tmp_path / "broken") == fingerprints(tmp_path / "whole")
    saved = "stages/02-green/adapter/adapter_model.safetensors"
    one, two = (load_file(tmp_path / name / saved) for name in ("whole", "broken"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
