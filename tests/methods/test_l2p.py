"""L2P: the right prompts are found by key from the prompt alone, in training and at test time."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainingArguments

import holdfast.runner.run
from holdfast import ContinualTrainer
from holdfast.api.rows import prompt
from holdfast.api.stage import Step
from holdfast.config.run import load_config
from holdfast.config.section import Named
from holdfast.engines.vectors import gradient_of, weights
from holdfast.errors import ConfigError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.respond import example_losses
from holdfast.methods.l2p import L2P
from holdfast.models.generation import generate
from holdfast.models.likelihood import token_losses
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from holdfast.tuners import build
from holdfast.tuners.prompt_keys import batch_queries, nearest, similarity
from holdfast.tuners.prompt_pool import PromptPool
from holdfast.tuners.soft_prompts import PromptPoolModel
from support.hints import hinted_config, hinted_model
from support.tiny import pad_rows, tiny_model, tiny_rows, tiny_stage

SIZE, LENGTH, TOP = 6, 3, 2


def pool_model():
    """A model with weights so large that prompts matter."""
    base = tiny_model(initializer_range=0.3, tie_word_embeddings=False)
    return PromptPool(size=SIZE, length=LENGTH, top_k=TOP, init="RANDOM").prepare(base).eval()


def plain_query(model, ids):
    """The mean last hidden state of the frozen model over some tokens, by themselves."""
    with model.disable_adapter():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0).detach()


def plain_choice(model, ids):
    """Numbers of the nearest prompts, the nearest first."""
    cosines = F.cosine_similarity(plain_query(model, ids)[None], model.prompt_keys.weight.detach())
    return sorted(range(SIZE), key=lambda k: -cosines[k])[:TOP]


def with_prompts(model, chosen, ids):
    """Logits of a row after the chosen prompts, put before its embeddings by hand."""
    pool = model.prompt_encoder["default"].embedding.weight.view(SIZE, LENGTH, -1)
    base = model.get_base_model()
    embeds = torch.cat([pool[chosen].flatten(0, 1), base.get_input_embeddings()(torch.tensor(ids))])[None]
    with model.disable_adapter():
        return base(inputs_embeds=embeds).logits[0, TOP * LENGTH :]


def answered(row, answer):
    """The row with another answer, of the same length."""
    length = len(prompt(row))
    ids = row["input_ids"][:length] + answer[: len(row["input_ids"]) - length]
    return {"input_ids": ids, "labels": [-100] * length + ids[length:]}


def test_queries_are_those_of_single_rows_whatever_the_padding():
    model, rows = pool_model(), tiny_rows(5)
    ids = [row["input_ids"] for row in rows]
    batch = pad_rows(rows)
    width = batch["input_ids"].shape[1]
    left = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    expected = torch.stack([plain_query(model, row) for row in ids])
    for tokens, seen in ((batch["input_ids"], batch["attention_mask"]), (left, mask)):
        found = batch_queries(model.train(), tokens, seen)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not found.requires_grad and not found.is_inference() and model.training


@pytest.mark.parametrize("frequent", [False, True])
def test_nearest_is_the_best_of_all_subsets(frequent):
    """Equations 3 and 4: the subset of smallest total distance, or distance times frequency."""
    torch.manual_seed(0)
    cosines = similarity(torch.randn(7, 8), torch.randn(SIZE, 8))
    frequency = torch.rand(SIZE) if frequent else torch.ones(SIZE)
    cost = (1 - cosines) * frequency
    for row, chosen in zip(cost, nearest(cosines, 3, frequency if frequent else None), strict=True):
        best = min(itertools.combinations(range(SIZE), 3), key=lambda subset: float(row[list(subset)].sum()))
        assert set(chosen.tolist()) == set(best)
        assert row[chosen].diff().min() >= 0


def test_of_prompts_that_were_never_chosen_the_nearest_come_first():
    cosines = torch.tensor([[0.1, 0.9, 0.5, 0.8]])
    assert nearest(cosines, 3, torch.tensor([0.0, 0.7, 0.0, 0.3])).tolist() == [[2, 0, 3]]


def test_each_row_gets_its_own_nearest_prompts():
    model, rows = pool_model(), tiny_rows(8)
    logits = model(**pad_rows(rows)).logits
    choices = [plain_choice(model, prompt(row)) for row in rows]
    assert len({tuple(chosen) for chosen in choices}) > 2
    for number, (row, chosen) in enumerate(zip(rows, choices, strict=True)):
        expected = with_prompts(model, chosen, row["input_ids"])
        torch.testing.assert_close(logits[number, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(with_prompts(model, chosen[::-1], row["input_ids"]), expected, atol=1e-3)


def test_generation_chooses_by_the_prompt_and_keeps_to_it():
    model = pool_model()
    prompts = [row["input_ids"] for row in tiny_rows(7, seed=3, length=14)]
    options = {"max_new_tokens": 5, "eos_token_ids": [], "pad_token_id": 0}
    expected = []
    for ids in prompts:
        chosen, text = plain_choice(model, ids), list(ids)
        for _ in range(5):
            text.append(int(with_prompts(model, chosen, text)[-1].argmax()))
        expected.append(text[len(ids) :])
    for batch_size in (1, 4, 100):
        assert generate(model, prompts, batch_size=batch_size, **options) == expected
    with model.disable_adapter():
        assert generate(model, prompts, batch_size=4, **options) != expected


def chosen_for(model, rows, told=None, labels=True):
    batch = pad_rows(rows)
    if not labels:
        del batch["labels"]
    model.train()
    with model.remembering(told or []):
        found = model(**batch)["chosen"].tolist()
    model.eval()
    return found


def test_the_answer_is_never_looked_at():
    model, rows = pool_model(), tiny_rows(30)
    others = [answered(row, [7, 9, 11, 13, 15, 17, 19, 21]) for row in rows]
    expected = [plain_choice(model, prompt(row)) for row in rows]
    for some in (rows, others):
        assert chosen_for(model, some) == expected
        assert chosen_for(model, some, told=some, labels=False) == expected
    # Untold and without labels all tokens count, as in generation; so it does make a difference.
    assert chosen_for(model, rows, labels=False) == [plain_choice(model, row["input_ids"]) for row in rows] != expected


def test_a_likelihood_at_test_time_is_taken_after_the_prompts_own_prompts(tmp_path):
    """at_test tells the model where answers begin, and takes it back."""
    setup = prepare(resolve(load_config(hinted_config(tmp_path, "l2p"))))
    model = setup.tuner.prepare(hinted_model()).eval()
    evaluation = ModelEvaluation(model, setup.encoder, batch_size=3, methods=setup.methods)
    examples = setup.stream.tasks[0].test
    losses, _ = example_losses(evaluation, examples)
    assert model.prompt_lengths == {}
    rows = setup.encoder.encode_all(examples)
    for row, loss in zip(rows, losses, strict=True):
        labels = torch.tensor([row["labels"]])
        outputs = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels)
        assert loss == pytest.approx(float(outputs.loss) * int((labels != -100).sum()), rel=1e-4)
    untold, _ = token_losses(model, rows, batch_size=3, pad_token_id=0)
    assert abs(untold - losses).max() > 1e-4


def test_only_prompts_and_keys_are_trained():
    model = pool_model()
    names = ["prompt_encoder.default.embedding.weight", "prompt_keys.weight"]
    assert list(weights(model).tensors) == names
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == SIZE * LENGTH * 16 + SIZE * 16


def step_of(stage, method, rows, micro_batches=1):
    return Step(stage, 0, len(rows), micro_batches, True)


def test_the_term_pulls_the_chosen_keys_to_the_queries_and_moves_nothing_else():
    model, rows = pool_model().train(), tiny_rows(6)
    method, stage = L2P(strength=0.7), tiny_stage(model, rows)
    method.before_stage(stage)
    assert method.declares(stage) == ("l2p",)
    batch = pad_rows(rows)
    outputs = model(**batch)
    term = method.loss_terms(step_of(stage, method, rows), batch, outputs)["l2p"]
    keys, expected = model.prompt_keys.weight, 0
    for row, chosen in zip(rows, outputs["chosen"].tolist(), strict=True):
        cosines = F.cosine_similarity(plain_query(model, prompt(row))[None], keys[chosen])
        expected = expected + 0.7 * (1 - cosines).sum() / len(rows)
    torch.testing.assert_close(term, expected)
    found = gradient_of(term, model).tensors
    assert found["prompt_encoder.default.embedding.weight"].abs().max() == 0
    torch.testing.assert_close(found["prompt_keys.weight"], torch.autograd.grad(expected, keys)[0])
    used = sorted(set(outputs["chosen"].flatten().tolist()))
    assert (found["prompt_keys.weight"].abs().max(1).values > 1e-3).nonzero().flatten().tolist() == used
    of_task = gradient_of(model(**batch).loss, model).tensors
    assert of_task["prompt_keys.weight"].abs().max() == 0  # the choice has no gradient
    prompts = of_task["prompt_encoder.default.embedding.weight"].view(SIZE, -1).abs().max(1).values
    assert (prompts > 0).nonzero().flatten().tolist() == used
    with torch.no_grad():
        keys -= 0.01 * found["prompt_keys.weight"]
    closer = model(**batch)["key_similarity"].gather(1, torch.zeros(len(rows), 1, dtype=torch.int64))
    assert (closer > outputs["key_similarity"][:, :1]).all()


def test_the_term_is_the_same_however_a_step_falls_into_micro_batches():
    model, rows = pool_model().train(), tiny_rows(7)
    method, stage = L2P(), tiny_stage(model, rows)
    method.before_stage(stage)

    def term(part, micro_batches):
        batch = pad_rows(part)
        return method.loss_terms(step_of(stage, method, rows, micro_batches), batch, model(**batch))["l2p"]

    torch.testing.assert_close((term(rows[:4], 2) + term(rows[4:], 2)) / 2, term(rows, 1))


def test_a_later_stage_prefers_what_past_stages_left_in_training_alone():
    model, rows = pool_model(), tiny_rows(8)
    method = L2P()
    stage = tiny_stage(model, rows)
    method.before_stage(stage)
    free = chosen_for(model, rows)
    batch = pad_rows(rows)
    outputs = {"chosen": torch.tensor([[0, 1]] * len(rows)), "key_similarity": torch.zeros(len(rows), TOP)}
    method.loss_terms(step_of(stage, method, rows), batch, outputs)
    method.after_stage(stage)
    assert method.past.tolist() == [8, 8, 0, 0, 0, 0]
    method.before_stage(tiny_stage(model, rows, index=2))
    diverse = chosen_for(model, rows)
    assert {0, 1} & set(itertools.chain(*free)) and not {0, 1} & set(itertools.chain(*diverse))
    assert chosen_for(model, rows, told=rows, labels=False) == free  # rows of other methods, as those of replay
    logits = model(**batch).logits  # not in training
    for row, found in zip(rows, logits, strict=True):
        expected = with_prompts(model, plain_choice(model, prompt(row)), row["input_ids"])
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    method.after_stage(stage)
    assert chosen_for(model, rows) == free
    for options in ({"diversify": False}, {"strength": 0}):
        plain = L2P(**options)
        plain.load_state(method.state(), model)
        plain.before_stage(tiny_stage(model, rows, index=2))
        assert chosen_for(model, rows) == free


def test_state_holds_counts_and_where_answers_begin():
    model, rows = pool_model(), tiny_rows(6)
    method = L2P()
    method.before_stage(tiny_stage(model, rows))
    method.now += 3
    other, fresh = L2P(), pool_model()
    other.load_state(method.state(), fresh)
    assert fresh.prompt_lengths == model.prompt_lengths and len(fresh.prompt_lengths) == 6
    assert other.state().keys() == method.state().keys()
    assert all(torch.equal(value, other.state()[key]) for key, value in method.state().items())
    assert chosen_for(fresh, rows, labels=False) == [plain_choice(fresh, prompt(row)) for row in rows]


def test_the_pool_is_saved_and_loaded(tmp_path):
    tuner = PromptPool(size=SIZE, length=LENGTH, top_k=TOP)
    model, batch = pool_model(), pad_rows(tiny_rows(5))
    tuner.save(model, tmp_path)
    assert json.loads((tmp_path / "prompt_pool.json").read_text()) == {"size": SIZE, "length": LENGTH, "top_k": TOP}
    base = tiny_model(initializer_range=0.3, tie_word_embeddings=False)
    prepared = tuner.prepare(base)
    tuner.load(prepared, tmp_path)
    assert len(weights(prepared).tensors) == 2
    base = tiny_model(initializer_range=0.3, tie_word_embeddings=False)
    for other in (prepared.eval(), PromptPoolModel.from_folder(base, tmp_path).eval()):
        assert torch.equal(other(**batch).logits, model(**batch).logits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """By name, with nothing but defaults; and sequential prompt tuning beside it."""
    folder = tmp_path_factory.mktemp("l2p")
    found = {}
    for name, changes in (("l2p", {}), ("sequential", {"tuner": "prompt"})):
        config = hinted_config(folder, name, output=str(folder / name), **changes)
        config["training"] |= {"epochs": 10, "learning_rate": 0.1}
        found[name] = holdfast.runner.run.run(config, Progress(quiet=True))
    return folder, found


def test_it_forgets_less_than_one_prompt_for_all(finished):
    _, found = finished
    assert found["l2p"]["summary"]["forgetting"] <= found["sequential"]["summary"]["forgetting"] - 0.3
    assert found["l2p"]["summary"]["average"] >= found["sequential"]["summary"]["average"] + 0.1


def trained_pool(folder):
    run = folder / "l2p"
    last = sorted(run.glob("stages/*-*/adapter"))[-1]
    return PromptPoolModel.from_folder(hinted_model(), last).eval(), json.loads((run / "run.json").read_text())


def test_test_prompts_find_the_prompts_that_their_task_was_trained_with(finished):
    """The chosen keys' accuracy: a test row's prompts are those that its stage's rows chose most, not another's."""
    folder, _ = finished
    model, _ = trained_pool(folder)
    counts = [torch.zeros(20, dtype=torch.int64)]
    for path in sorted((folder / "l2p").glob("stages/*/method/l2p.safetensors")):
        counts.append(load_file(path)["past"])
    config = load_config(hinted_config(folder, "l2p"))
    setup = prepare(resolve(config))
    right, total = 0, 0
    for stage, task in enumerate(setup.stream.tasks, start=1):
        own = counts[stage] - counts[stage - 1]
        learned = set(own.topk(4).indices.tolist())
        for example in task.test:
            ids = setup.encoder.prompt(example, reserve=3)
            cosines = similarity(plain_query(model, ids)[None], model.prompt_keys.weight)
            right += len(learned & set(nearest(cosines, 4)[0].tolist()))
            total += 4
    assert right / total > 0.9


def test_evaluation_uses_the_chosen_prompts(finished):
    """Other prompts, or none, give other responses."""
    folder, _ = finished
    model, _ = trained_pool(folder)
    config = load_config(hinted_config(folder, "l2p"))
    setup = prepare(resolve(config))
    prompts = [setup.encoder.prompt(example, reserve=3) for task in setup.stream.tasks for example in task.test]
    options = {"max_new_tokens": 3, "batch_size": 8, "eos_token_ids": setup.encoder.stop_ids, "pad_token_id": 0}
    texts = [setup.encoder.decode(tokens) for tokens in generate(model, prompts, **options)]
    recorded = [
        json.loads(line)["response"]
        for name in ("red", "green", "blue")
        for line in (folder / f"l2p/stages/03-blue/responses/{name}.jsonl").read_text().splitlines()
    ]
    assert texts == recorded
    with model.disable_adapter():
        assert [setup.encoder.decode(tokens) for tokens in generate(model, prompts, **options)] != texts
    with torch.no_grad():
        model.prompt_keys.weight.mul_(-1)  # the farthest are nearest now
    assert [setup.encoder.decode(tokens) for tokens in generate(model, prompts, **options)] != texts


def test_replay_beside_it_never_shows_an_answer_to_the_keys(tmp_path, monkeypatch):
    """Rehearsal rows pass through without labels; the model has been told where their answers begin."""
    seen: list[tuple[int, int]] = []
    original = PromptPoolModel._before_answer

    def watch(self, ids, mask, labels):
        found = original(self, ids, mask, labels)
        if self.training:
            seen.extend((int(n), int(m)) for n, m in zip(found.sum(1), mask.sum(1), strict=True))
        return found

    monkeypatch.setattr(PromptPoolModel, "_before_answer", watch)
    config = hinted_config(tmp_path, ["replay", "l2p"])
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": 1, "gradient_checkpointing": True}
    matrix = holdfast.runner.run.run(config, Progress(quiet=True))
    assert len(matrix["scores"]) == 3 and len(seen) > 48
    assert all(0 < before == tokens - 3 for before, tokens in seen)  # " r" and the end


def test_a_model_without_a_pool_is_refused_and_one_with_it_works_in_the_trainer(tmp_path):
    rows = tiny_rows(16)
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True)

    def trainer(model):
        return ContinualTrainer(model=model, args=arguments, train_dataset=rows, data_collator=pad_rows, method="l2p")

    with pytest.raises(ConfigError, match="prompt_pool"):
        trainer(tiny_model()).train()
    model = pool_model()
    before = weights(model).copy()
    trainer(model).train()
    assert all(not torch.equal(p, before.tensors[name]) for name, p in weights(model).tensors.items())


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match="top_k: 5 prompts cannot be chosen from a pool of 4"):
        build(Named(name="prompt_pool", size=4, top_k=5))
    with pytest.raises(ConfigError, match="init"):
        build(Named(name="prompt_pool", init="TEXT"))
