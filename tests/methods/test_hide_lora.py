"""HiDe-LoRA: the task is told from the prompt alone, and its adapter, no other, answers."""

from __future__ import annotations

import json
import random

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

import holdfast.runner.measure
import holdfast.runner.run
from holdfast.config.model import ModelConfig
from holdfast.config.section import Named
from holdfast.data.collate import Collator
from holdfast.data.encode import Encoder
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.methods import build
from holdfast.methods.hide_lora import HiDeLoRA, k_means
from holdfast.methods.parts.queries import prompt_queries
from holdfast.models.generation import generate
from holdfast.models.pretrained import load_tokenizer
from holdfast.system.progress import Progress
from holdfast.training.method_state import load_states, save_states
from holdfast.training.trainer import ContinualTrainer
from holdfast.tuners import build as build_tuner
from support.paths import SHARED
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_stage, tiny_tokenizer

TUNER = {"name": "lora", "r": 4, "lora_dropout": 0.0}


def lora_model(seed=0):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules="all-linear")
    return peft.get_peft_model(tiny_model(seed), config)


def task_rows(task, count, seed=0):
    """Prompts of a task hold more of its letters than of others, in any order and length; the answer is one letter."""
    chance = random.Random(f"{task}/{seed}")
    rows = []
    for _ in range(count):
        pool = [*range(5 + 12 * task, 17 + 12 * task)] * 12 + [*range(3, 60)]
        ids = chance.choices(pool, k=chance.randrange(10, 20))
        rows.append({"input_ids": [*ids, 3 + task], "labels": [-100] * len(ids) + [3 + task]})
    return rows


def shift(model, seed):
    torch.manual_seed(seed)
    for t in weights(model):
        t.add_(0.3 * torch.randn_like(t))


def after_stages(count=3, model=None, **options):
    """A method after ``count`` tasks, each of which changed the adapter at random."""
    model = lora_model() if model is None else model
    method = HiDeLoRA(**options)
    for index in range(1, count + 1):
        stage = tiny_stage(model, task_rows(index - 1, 60), index)
        method.before_stage(stage)
        shift(model, index)
        method.after_stage(stage)
    return method, model


def evaluation(model, *methods, batch_size=4):
    return ModelEvaluation(model, Encoder(tiny_tokenizer(), max_length=64), batch_size, list(methods))


def soft_prompt_model():
    return build_tuner(Named(name="prompt", num_virtual_tokens=3)).prepare(tiny_model())


def prefix_model():
    return build_tuner(Named(name="prefix", num_virtual_tokens=3)).prepare(tiny_model())


@pytest.mark.parametrize("make", [lora_model, tiny_model, soft_prompt_model, prefix_model])
def test_a_feature_is_the_mean_hidden_state_of_the_prompt(make):
    """Equal to one unpadded forward pass of the plain model for each row; the answer does not count."""
    model, plain = make().train(), tiny_model().eval()
    rows = [*task_rows(0, 5), {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    found = prompt_queries(model, rows, pad_rows, batch_size=4)
    for row, feature in zip(rows, found, strict=True):
        ids = row["input_ids"] if row["labels"][0] != -100 else row["input_ids"][:-1]
        with torch.no_grad():
            hidden = plain.model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(feature, hidden.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert model.training and found.shape == (6, 16) and not found.is_inference()


@pytest.mark.parametrize("options", [{}, {"centroids": 3}, {"shrinkage": 1.0}])
def test_the_task_is_inferred_on_new_prompts_of_separable_tasks(options):
    method, model = after_stages(3, **options)
    rows = [row for task in range(3) for row in task_rows(task, 40, seed=1)]
    parts = list(method.at_test(evaluation(model), rows))
    assert sorted(i for part in parts for i in part) == list(range(120))
    right = sum(i // 40 == task for task, part in enumerate(parts) for i in part)
    assert len(parts) == 3 and right / 120 > 0.9


def test_what_the_adapter_has_learned_does_not_change_which_task_a_prompt_belongs_to():
    method, model = after_stages(2)
    rows = [row for task in range(2) for row in task_rows(task, 20, seed=1)]
    before = list(method.at_test(evaluation(model), rows))
    shift(model, seed=9)
    assert list(method.at_test(evaluation(model), rows)) == before


def test_the_gaussian_is_that_of_a_plain_loop():
    """The log density of each mean's Gaussian with the shared covariance, written out."""
    method, model = after_stages(3, centroids=2, shrinkage=0.3)
    chosen = []
    for task in range(3):
        stage = tiny_stage(model, task_rows(task, 60), task + 1)
        rows = stage.random("hide_lora").sample(range(60), 60)
        chosen.append(prompt_queries(lora_model(), [stage.rows[i] for i in rows], pad_rows, 4).double())
    covariance = torch.zeros(16, 16, dtype=torch.float64)
    for features, means in zip(chosen, method.means, strict=True):
        for feature in features:
            rest = feature - min(means, key=lambda mean, f=feature: float((f - mean).square().sum()))
            covariance += torch.outer(rest, rest) / 180
    shrunk = 0.7 * covariance + 0.3 * covariance.diagonal().mean() * torch.eye(16)
    everything = torch.cat(chosen)
    torch.manual_seed(0)
    queries = everything.mean(dim=0) + 2 * everything.std(dim=0) * torch.randn(200, 16)  # between and beyond the tasks
    expected = []
    for query in queries:
        densities = [
            max(float(torch.distributions.MultivariateNormal(mean, shrunk).log_prob(query)) for mean in means)
            for means in method.means
        ]
        expected.append(densities.index(max(densities)))
    assert method.infer(queries) == expected and set(expected) == {0, 1, 2}


def test_identical_prompts_within_each_task_still_have_a_covariance():
    model, method = lora_model(), HiDeLoRA()
    for index, token in ((1, 5), (2, 9)):
        stage = tiny_stage(model, [{"input_ids": [token, token, 4], "labels": [-100, -100, 4]}] * 3, index)
        method.before_stage(stage)
        method.after_stage(stage)
    assert list(method.at_test(evaluation(model), [{"input_ids": [9, 9]}, {"input_ids": [5, 5]}])) == [[1], [0]]


def test_k_means_finds_planted_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    x = torch.cat([centre + torch.randn(30, 2) for centre in centres])
    means, nearest = k_means(x, 3, random.Random(0))
    for mean, k in zip(means, range(3), strict=True):
        torch.testing.assert_close(mean, x[nearest == k].mean(dim=0))
        assert torch.cdist(mean[None], centres).min() < 0.6
    assert len(k_means(x[[0, 1, 0, 1]], 5, random.Random(0))[0]) == 2


def test_a_row_is_answered_as_by_the_model_with_its_tasks_adapter_loaded_plainly(tmp_path):
    """Responses of at_test and of plain PEFT, which loads each stage's saved adapter into a fresh model."""
    model, method, folders = lora_model(), HiDeLoRA(), []
    model.get_base_model().save_pretrained(tmp_path / "base")
    for index in (1, 2):
        stage = tiny_stage(model, task_rows(index - 1, 60), index)
        method.before_stage(stage)
        shift(model, index)
        method.after_stage(stage)
        folders.append(tmp_path / str(index))
        model.save_pretrained(folders[-1])
    prompts = [row["input_ids"][:-1] for task in (0, 1) for row in task_rows(task, 8, seed=1)]
    options = {"max_new_tokens": 6, "batch_size": 1, "eos_token_ids": [2], "pad_token_id": 0}
    found, tasks = {}, {}
    for part in evaluation(model, method).parts([{"input_ids": ids} for ids in prompts]):
        for i, response in zip(part, generate(model, [prompts[i] for i in part], **options), strict=True):
            found[i], tasks[i] = response, len(tasks) >= 8
    loaded = [peft.PeftModel.from_pretrained(tiny_model(), folder) for folder in folders]
    for i, ids in enumerate(prompts):
        task = next(
            t
            for t, part in enumerate(method.at_test(evaluation(model), [{"input_ids": p} for p in prompts]))
            if i in part
        )
        assert found[i] == generate(loaded[task], [ids], **options)[0]
    assert generate(loaded[0], prompts, **options) != generate(loaded[1], prompts, **options)


@pytest.mark.parametrize("stop", [0, 1, None])
def test_the_weights_are_as_they_were_afterwards_and_when_it_is_closed_early(stop):
    method, model = after_stages(3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    parts = method.at_test(evaluation(model), [row for task in range(3) for row in task_rows(task, 5)])
    changed = False
    for number, _ in enumerate(parts):
        changed |= not all(torch.equal(before[name], p) for name, p in model.named_parameters())
        if number == stop:
            break
    parts.close()
    assert changed and all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters()) and model.training


def test_neither_order_nor_company_of_rows_changes_their_task():
    method, model = after_stages(3)
    rows = [row for task in range(3) for row in task_rows(task, 10, seed=1)]

    def inferred(rows, batch_size=4):
        parts = enumerate(method.at_test(evaluation(model, batch_size=batch_size), rows))
        return {tuple(rows[i]["input_ids"]): task for task, part in parts for i in part}

    whole = inferred(rows)
    assert inferred(rows[::-1]) == whole and inferred(rows, batch_size=1) == whole
    assert set(whole.values()) == {0, 1, 2}


def test_before_the_first_stage_the_model_answers_as_it_is():
    model = lora_model()
    assert list(HiDeLoRA().at_test(evaluation(model), [{"input_ids": [3]}] * 4)) == [range(4)]


def test_state_round_trip(tmp_path):
    method, model = after_stages(3, centroids=2)
    save_states([method], tmp_path)
    other = HiDeLoRA(centroids=2)
    load_states([other], tmp_path, model)
    one, two = method.state(), other.state()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key], key
    rows = [row for task in range(3) for row in task_rows(task, 10, seed=1)]
    assert list(other.at_test(evaluation(model), rows)) == list(method.at_test(evaluation(model), rows))
    # Both store a fourth task equally, so the statistics continue from the saved ones.
    for this in (method, other):
        this.after_stage(tiny_stage(model, task_rows(3, 60), 4))
    assert torch.equal(method.scatter, other.scatter) and method.rows == other.rows == 240


@pytest.mark.parametrize("start", ["previous", "fresh"])
def test_what_a_stage_trains(start):
    model, method = lora_model(), HiDeLoRA(start=start)
    first = weights(model).copy()
    for index in (1, 2):
        stage = tiny_stage(model, task_rows(index - 1, 10), index)
        last = weights(model).copy()
        method.before_stage(stage)
        for name, t in weights(model).tensors.items():
            assert torch.equal(t, (first if start == "fresh" else last).tensors[name])
        shift(model, index)
        method.after_stage(stage)


def test_methods_that_exchange_the_weights_themselves_are_refused():
    for other in ("o_lora", "seq_lora_merge", "mbpa"):
        with pytest.raises(ConfigError, match="cannot be applied together"):
            build([("hide_lora", {}), (other, {})])


@pytest.mark.parametrize("make", [lora_model, tiny_model, soft_prompt_model])
def test_in_the_drop_in_trainer_each_call_of_train_keeps_what_it_trained(make, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=2, save_strategy="no")
    model = make()
    trainer = ContinualTrainer(model=model, args=args, method="hide_lora", data_collator=Collator(0))
    kept = []
    for task in (0, 1):
        trainer.train_dataset = task_rows(task, 40)
        trainer.train()
        kept.append(weights(model).copy())
    [method] = trainer.methods
    rows = [row for task in (0, 1) for row in task_rows(task, 10, seed=1)]
    parts = method.at_test(evaluation(model), rows)
    for task, (part, adapter, expected) in enumerate(zip(parts, method.adapters, kept, strict=True)):
        assert sorted(part) == [*range(10 * task, 10 * task + 10)]
        assert all(torch.equal(t, expected.tensors[name]) for name, t in adapter.tensors.items())
        assert all(torch.equal(t, expected.tensors[name]) for name, t in weights(model).tensors.items())
    assert not all(torch.equal(t, kept[1].tensors[name]) for name, t in kept[0].tensors.items())


def run(folder, output, method, tasks=("red", "green"), **training):
    config = tiny_config(folder, method=method, tuner=TUNER, output=str(folder / output))
    config["stream"]["order"] = list(tasks)
    config["training"] |= {"epochs": 2} | training
    holdfast.runner.run.run(config, Progress(quiet=True))
    return folder / output


def responses(path):
    return {
        str(file.relative_to(path)): file.read_text() for file in sorted(path.glob("stages/*/responses/**/*.jsonl"))
    }


def adapter(path, stage):
    return load_file(path / "stages" / stage / "adapter" / "adapter_model.safetensors")


def test_a_run_answers_past_tasks_with_their_adapters_and_one_task_is_plain_lora(tmp_path):
    training = {"epochs": 24, "learning_rate": 0.02}  # enough that the first task is learned, and then forgotten
    ours, plain = run(tmp_path, "ours", "hide_lora", **training), run(tmp_path, "plain", "sequential", **training)
    for stage in ("01-red", "02-green"):
        one, two = adapter(ours, stage), adapter(plain, stage)
        assert all(torch.equal(one[name], two[name]) for name in two)
    found, expected = responses(ours), responses(plain)
    after_first = [name for name in found if not name.startswith("stages/02")]
    assert all(found[name] == expected[name] for name in after_first)
    # After stage 2 red's rows are answered as after stage 1, and green's as sequential training answers them.
    red, green = (f"stages/02-green/responses/{task}.jsonl" for task in ("red", "green"))
    assert found[red] == found[red.replace("02-green", "01-red")] != expected[red]
    assert found[green] == expected[green]
    forgetting = [json.loads((path / "matrix.json").read_text())["summary"]["forgetting"] for path in (ours, plain)]
    assert forgetting[0] == 0 < forgetting[1]


def test_a_run_that_is_continued_from_its_files_is_the_unbroken_one(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    method = {"name": "hide_lora", "start": "fresh"}
    unbroken = run(tmp_path, "unbroken", method, save_every=4)
    evaluate = holdfast.runner.measure.evaluate_task
    calls = []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == 4:  # the second task after stage 1
            raise Killed
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.measure, "evaluate_task", dying)
        with pytest.raises(Killed):
            run(tmp_path, "broken", method, save_every=4)
    broken = run(tmp_path, "broken", method, save_every=4)
    assert responses(broken) == responses(unbroken)
    for stage in ("01-red", "02-green"):
        one, two = (load_file(path / f"stages/{stage}/method/hide_lora.safetensors") for path in (broken, unbroken))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


def test_inference_on_real_tasks():
    """Held-back prompts of three real benchmarks, with a real pretrained model of 260,000 parameters."""
    data = SHARED / "data"
    if not data.exists():
        pytest.skip("needs ../shared/data")
    folder, tasks = data / "models" / "stories260K" / "hf", ("FOMC", "NumGLUE-cm", "ScienceQA")
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)

    def rows(task, split, count):
        prompts = json.loads((data / "trace" / "LLM-CL-Benchmark_500" / task / f"{split}.json").read_text())[:count]
        return [{"input_ids": tokenizer(row["prompt"])["input_ids"][:128]} for row in prompts]

    method = HiDeLoRA()
    for index, task in enumerate(tasks, start=1):
        stage = tiny_stage(
            model, [row | {"labels": [-100] * len(row["input_ids"])} for row in rows(task, "train", 60)], index
        )
        method.before_stage(stage)
        method.after_stage(stage)
    test = [row for task in tasks for row in rows(task, "test", 20)]
    encoder = Encoder(tokenizer, max_length=512)
    parts = list(method.at_test(ModelEvaluation(model, encoder, 8), test))
    assert sum(i // 20 == task for task, part in enumerate(parts) for i in part) / 60 > 0.9
