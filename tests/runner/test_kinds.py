"""Streams of several kinds of tasks: answers, preferences and rewarded answers, one after another."""

from __future__ import annotations

import copy
import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from holdfast import load_config, methods, run
from holdfast.errors import ConfigError, DataError
from holdfast.runner import stage as stages
from holdfast.runner.evaluate import evaluate
from holdfast.runner.kinds import check_kinds, prompt_tokens, reward_of, trained_rows
from holdfast.runner.setup import prepare, resolve
from holdfast.runner.stage import check_training, stage_seed
from holdfast.scoring.reward import rewards
from holdfast.system.progress import Progress
from holdfast.training.kinds import make_trainer
from support.guards import case
from support.kinds import MAKERS, judged_rows, pair_rows, rewarded_rows, stream_of
from support.paths import DOCS
from support.resumed import finish, results, start
from support.tiny import tiny_config, tiny_tokenizer, write_tasks

trl = pytest.importorskip("trl", reason="TRL is not installed")


def done(config, *overrides):
    return run(load_config(config, list(overrides)), Progress(quiet=True))


def prepared(config):
    return prepare(resolve(load_config(config)))


@pytest.mark.parametrize(
    ("tuner", "points"),
    [
        pytest.param("full", [("step", 6), ("step", 4)], marks=pytest.mark.slow),  # in the stages of KTO and GRPO
        ({"name": "lora", "r": 2, "lora_dropout": 0.2}, [("step", 4)]),  # of DPO
    ],
    ids=["full", "lora"],
)
def test_a_killed_stream_of_kinds_ends_as_an_unbroken_one(tuner, points, tmp_path):
    """SFT, DPO, KTO, GRPO and SFT again: the same weights bit for bit."""
    config = stream_of(tmp_path, "dpo", "kto", "grpo", tuner=tuner, method=["replay", "ewc"])
    config["stream"]["tasks"][3]["reward"] = "support.rewards:early_letters"
    config["stream"]["tasks"][3]["options"]["beta"] = 0.1
    write_tasks(tmp_path / "tasks", ["blue"], train=16)
    config["stream"]["tasks"].append({"name": "blue", "path": str(tmp_path / "tasks" / "blue")})
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | {"output": str(tmp_path / name)}))
    assert finish(start(tmp_path / "whole.json")) == 0
    for point, count in points:
        assert finish(start(tmp_path / "killed.json", point, count)) == -signal.SIGKILL
    assert finish(start(tmp_path / "killed.json")) == 0
    whole, killed = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert whole["matrix"] == killed["matrix"] and whole["weights"] == killed["weights"]
    assert whole["responses"] == killed["responses"] and whole["steps"] == killed["steps"]
    matrix = whole["matrix"]
    assert matrix["metrics"] == {
        "red": "accuracy",
        "dpo": "preference",
        "kto": "preference",
        "grpo": "reward:support.rewards:early_letters",
        "blue": "accuracy",
    }
    assert all(score is not None for row in matrix["scores"] for score in row)
    learned = [terms["task"] for stage, _, terms in whole["steps"] if stage == 4]
    assert any(abs(loss) > 1e-3 for loss in learned)  # answers of one prompt differ in their reward
    files = {path.name for path in (tmp_path / "whole" / "stages").glob("*/*/*")}
    assert not any("ref" in name for name in files)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_stage_is_what_trl_trains(kind, tmp_path, monkeypatch):
    """The same loss in every step, and the same weights, as TRL's own trainer on the same rows."""
    config = stream_of(tmp_path, kind)
    config["stream"]["tasks"] = config["stream"]["tasks"][1:]
    trainers = []
    monkeypatch.setattr(stages, "make_trainer", lambda *a, **b: trainers.append(make_trainer(*a, **b)) or trainers[0])
    done(config)
    rows = MAKERS[kind]()
    for row in rows:
        row |= {key: f" {row[key]}" for key in ("chosen", "rejected", "completion") if key in row}
    if kind == "kto":  # whose rows have an order of their own in each stage, in which TRL mismatches them
        decode, found = tiny_tokenizer().decode, trainers[0].train_dataset
        order = [decode(p) + decode(c[:-1]) for p, c in zip(found["prompt_ids"], found["completion_ids"], strict=True)]
        asked = {row["prompt"] + row["completion"]: row for row in rows}
        assert sorted(order) == sorted(asked) and order != list(asked)
        rows = [asked[text] for text in order]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    arguments = getattr(trl, f"{kind.upper()}Config")(
        output_dir=str(tmp_path / "plain"),
        per_device_train_batch_size=config["training"]["micro_batch_size"],
        gradient_accumulation_steps=config["training"]["batch_size"] // config["training"]["micro_batch_size"],
        num_train_epochs=config["training"]["epochs"],
        learning_rate=1e-2,
        lr_scheduler_type=load_config(config).training.schedule,
        warmup_steps=load_config(config).training.warmup,
        weight_decay=load_config(config).training.weight_decay,
        beta=0.3,
        seed=stage_seed(0, 1),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    plain = getattr(trl, f"{kind.upper()}Trainer")(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    plain.train()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in plain.state.log_history if "loss" in line]
    assert [event["loss"] for event in events] == pytest.approx(losses, rel=1e-6)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stages" / f"01-{kind}" / "model").state_dict()
    for name, tensor in plain.model.state_dict().items():
        assert torch.allclose(ours[name], tensor, atol=1e-6), name


def logprob(model, prompt, answer):
    """The sum of the log-probabilities of an answer's tokens and its end, and their number, written plainly."""
    tokenizer = tiny_tokenizer()
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {answer}"))
    ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].log_softmax(-1)
    values = logs[torch.arange(len(logs)), ids[0, 1:]][len(before) - 1 :]
    return float(values.sum()), len(values)


def test_the_metric_of_pairs_by_brute_force(tmp_path):
    config = stream_of(tmp_path, "dpo", method="frozen")
    rows = pair_rows(24, 20)
    (tmp_path / "tasks" / "dpo" / "test.json").write_text(json.dumps(rows))
    matrix = done(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    right = [
        logprob(model, row["prompt"], row["chosen"])[0] > logprob(model, row["prompt"], row["rejected"])[0]
        for row in rows
    ]
    assert matrix["scores"][0][1] == pytest.approx(sum(right) / len(right)) and 0 < sum(right) < len(right)


def test_answers_without_a_pair_are_scored_one_by_one(tmp_path):
    config = stream_of(tmp_path, "kto", method="frozen")
    rows = judged_rows(8)[::3]  # no two to one prompt
    (tmp_path / "tasks" / "kto" / "test.json").write_text(json.dumps(rows))
    matrix = done(config)
    assert matrix["metrics"]["kto"] == "judged_likelihood"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    likely = []
    for row in rows:
        total, tokens = logprob(model, row["prompt"], row["completion"])
        p = torch.tensor(total / tokens).exp().item()
        likely.append(p if row["label"] else 1 - p)
    assert matrix["scores"][0][1] == pytest.approx(sum(likely) / len(likely), rel=1e-5)
    [note] = [note for note in prepared(config).stream.tasks[1].notes if "no prompt" in note]
    assert "each is scored by itself" in note


def test_the_metric_of_rewarded_answers_is_their_mean_reward(tmp_path, monkeypatch):
    """A function of the user's trains the stage, with the columns of its rows, and scores the greedy answers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worth.py").write_text(
        "def length(prompts, completions, least, **columns):\n"
        "    assert len(prompts) == len(completions) == len(least)\n"
        "    return [len(text) - low for text, low in zip(completions, least)]\n"
    )
    config = stream_of(tmp_path, "grpo", tuner="full")
    for split in ("train", "test"):
        file = tmp_path / "tasks" / "grpo" / f"{split}.json"
        rows = [{"prompt": row["prompt"], "least": 1} for row in json.loads(file.read_text())]
        file.write_text(json.dumps(rows))
    config["stream"]["tasks"][1] |= {"reward": "worth:length"}
    matrix = done(config)
    assert matrix["metrics"]["grpo"] == "reward:worth:length"
    for stage, row in (("00-start", 0), ("02-grpo", 2)):
        file = tmp_path / "run" / "stages" / stage / "responses" / "grpo.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert [record["score"] for record in records] == [len(record["response"]) - 1 for record in records]
        assert matrix["scores"][row][1] == pytest.approx(sum(record["score"] for record in records) / len(records))
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]["reward worth:length"]) == {"worth.py"}
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"method ewc: task 'grpo' is of kind grpo, and it reads the answers"):
        prepared(config | {"method": "ewc"})


def test_rows_of_methods_are_prompts_with_good_answers(tmp_path):
    """They are what replay stores of a task: rows of the next-token loss."""
    setup = prepared(stream_of(tmp_path, "dpo", "kto", "grpo"))
    decode = setup.encoder.tokenizer.decode
    for kind in ("dpo", "kto", "grpo"):
        pairs = pair_rows({"dpo": 16, "kto": 6, "grpo": 8}[kind])
        rows = setup.rows[kind]
        assert [decode(row["input_ids"]) for row in rows] == [f"{p['prompt']} {p['chosen']}</s>" for p in pairs]
        assert all([token for token in row["labels"] if token != -100] == row["input_ids"][-3:] for row in rows)


def test_nothing_of_trl_stays_on_the_model(tmp_path):
    from holdfast.runner.loop import RunLoop

    seen = []
    train = RunLoop._train

    def watched(loop, stage):
        train(loop, stage)
        model = loop.model
        inner = model.get_base_model()
        dropouts = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        configs = [repr(vars(config)) for config in (inner.config, inner.generation_config)]
        seen.append((list(model.peft_config), dropouts, {"forward", "model_tags"} & set(vars(inner)), configs))

    config = stream_of(tmp_path, "dpo", "grpo", tuner={"name": "lora", "r": 2, "lora_dropout": 0.2})
    config["stream"]["tasks"][2]["options"]["beta"] = 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLoop, "_train", watched)
        done(config)
    assert seen == [(["default"], {0.2}, set(), seen[0][-1])] * 3  # of the sft stage, which is first


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_reference_is_the_start_of_the_stage(tuner, tmp_path, monkeypatch):
    """With beta of grpo; that of dpo is compared with TRL's own above."""
    references = []

    def watched(kind, model, *args, **options):
        trainer = make_trainer(kind, model, *args, **options)
        reference = model if tuner == "lora" else trainer.ref_model
        references.append(
            {name: t.clone() for name, t in reference.state_dict().items() if tuner == "full" or ".ref." in name}
        )
        return trainer

    monkeypatch.setattr(stages, "make_trainer", watched)
    config = stream_of(tmp_path, "grpo", tuner=tuner)
    config["stream"]["tasks"][1]["options"]["beta"] = 0.1
    done(config)
    folder = tmp_path / "run" / "stages" / "01-red" / ("model" if tuner == "full" else "adapter")
    [file] = folder.glob("*.safetensors")
    saved = load_file(file)
    [reference] = references
    assert reference
    for name, tensor in reference.items():
        if name != "lm_head.weight":  # tied
            assert torch.equal(tensor, saved[name.replace(".ref.", ".")]), name


def test_the_reference_has_no_dropout_where_the_training_has(tmp_path, monkeypatch):
    seen = []

    def watched(kind, model, *args, **options):
        training = model.training
        model.eval()
        expected = [logprob(model, row["prompt"], row["chosen"])[0] for row in pair_rows()]
        model.train()
        trainer = make_trainer(kind, model, *args, **options)
        seen.append((trainer.train_dataset["ref_chosen_logps"], expected, model.training))
        model.train(training)
        return trainer

    monkeypatch.setattr(stages, "make_trainer", watched)
    config = stream_of(tmp_path, "dpo", tuner={"name": "lora", "r": 2, "lora_dropout": 0.5})
    config["stream"]["tasks"][1]["options"]["disable_dropout"] = False
    done(config)
    [(found, expected, training)] = seen
    assert list(found) == pytest.approx(expected, abs=1e-4) and training


def test_each_process_writes_answers_of_its_own(tmp_path, monkeypatch):
    """The answers to one prompt may be divided among processes, where the same numbers would write them twice."""
    drawn = {}

    def watched(kind, *args, **options):
        trainer, rng = make_trainer(kind, *args, **options), torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl.GRPOTrainer, "_prepare_inputs", lambda *_: torch.initial_seed())
            for rank in (0, 1):
                patch.setattr(type(trainer.accelerator), "process_index", rank)
                drawn[rank] = [trainer._prepare_inputs([]) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), rng)
        return trainer

    monkeypatch.setattr(stages, "make_trainer", watched)
    done(stream_of(tmp_path, "grpo"), "training.max_steps=1")
    (first, again), (other, _) = drawn.values()
    assert first == again != other


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("dpo", {"prompt": "a?", "chosen": "b"}, "rejected: is missing"),
        ("dpo", {"prompt": "a?", "chosen": "b", "rejected": " b"}, "chosen and rejected are the same answer"),
        ("dpo", {"chosen": "b", "rejected": "c"}, "prompt: is missing or null"),
        (
            "dpo",
            {"prompt": "a?", "chosen": [{"role": "assistant", "content": "b"}] * 2, "rejected": "c"},
            "one message",
        ),
        (
            "dpo",
            {"prompt": [{"role": "assistant", "content": "b"}], "chosen": "b", "rejected": "c"},
            "prompt: must begin",
        ),
        ("kto", {"prompt": "a?", "completion": "b", "label": 1}, "label: must be true .* or false, not a number"),
        ("kto", {"prompt": "a?", "completion": "", "label": True}, "completion: is empty"),
        ("grpo", {"prompt": "a?"}, "answer: is missing or null; reward exact_match compares with it"),
        ("grpo", {"prompt": 3, "answer": "b"}, "prompt: must be text"),
    ],
)
def test_a_bad_row_is_named(kind, row, reason, tmp_path):
    config = stream_of(tmp_path, kind)
    file = tmp_path / "tasks" / kind / "train.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([*rows[:2], row, *rows[2:]]))
    with pytest.raises(DataError, match=rf"train\.json: row 3.*{reason}"):
        prepared(config)


def test_conversations_whose_last_messages_differ(tmp_path):
    config = stream_of(tmp_path, "dpo")
    file = tmp_path / "tasks" / "dpo" / "train.json"
    rows = [
        {
            key: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
            for key in ("chosen", "rejected")
        }
        for row in pair_rows()
    ]
    before = prepared(config).rows["dpo"]
    file.write_text(json.dumps(rows))
    assert prepared(config).rows["dpo"] == before


def page_of_kinds():
    """What the page says of each method in stages of dpo and kto, and of grpo."""
    page = (DOCS / "preferences.md").read_text(encoding="utf-8").partition("## Methods")[2]
    rows = [line.strip("|").split(" | ") for line in page.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    found = [(name, [cell.strip() for cell in said]) for names, *said in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(dict(found)) == len(found)
    return dict(found)


def refused(name, kind, answered=True, **options):
    """Why a method cannot be in a run with a task of a kind; empty where it can."""
    needed = {key: value for key, value in case(name).options.items() if key in ("path", "source")}
    method = methods.find(name)(**needed)
    tuner = method.tuners[0] if method.tuners else "lora"
    examples = [SimpleNamespace(answered=answered)]
    task = SimpleNamespace(name=kind, kind=kind, options=options, train=examples)
    try:
        check_kinds([task], [method], tuner, load_config({"model": "m", "stream": "chronicle", "output": "o"}), 64)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted(methods.METHODS.own))
def test_the_page_says_what_becomes_of_every_method(name):
    preferences, rewarded = page_of_kinds()[name]
    for kind in ("dpo", "kto"):
        assert bool(refused(name, kind)) == preferences.startswith("refused")
    assert bool(refused(name, "grpo")) == rewarded.startswith("refused")
    assert bool(refused(name, "grpo", answered=False)) == (not rewarded.startswith(("yes", "nothing")))


def test_the_page_names_the_methods_that_want_the_adapter_alone():
    page = (DOCS / "preferences.md").read_text(encoding="utf-8")
    named = re.search(r"the methods of LoRA alone \(([^)]*)\)", page)[1]
    found = [name for name in methods.METHODS.own if not refused(name, "grpo") and refused(name, "grpo", beta=0.1)]
    assert sorted(re.findall(r"`(\w+)`", named)) == sorted(found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "lwf"}, "method lwf: task 'dpo' is of kind dpo, and it works on the task's rows in each batch"),
        ({"method": {"name": "replay", "way": "replace"}}, "method replay: task 'dpo' .* works on the task's rows"),
        ({"method": "joint"}, "method joint: task 'dpo' .* all tasks would be one stage"),
        ({"tuner": "prompt"}, "tuner: task 'dpo' is of kind dpo, which works with full, .*, not with prompt"),
        ({"data": {"packing": True}}, "data.packing: task 'dpo' is of kind dpo"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(changes, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        prepared(stream_of(tmp_path, "dpo", **changes))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("dpo", {"betta": 0.1}, "options.betta: TRL's DPOConfig has no such field; did you mean 'beta'"),
        ("dpo", {"learning_rate": 0.1}, "options.learning_rate: belongs to training"),
        ("dpo", {"max_length": 3}, "options.max_length: cannot be given: use data.max_length"),
        ("grpo", {"num_iterations": 2}, "options.num_iterations: cannot be given: a stopped stage"),
        ("grpo", {"num_generations": 3}, "3 answers to each prompt do not divide the 8 of a step .*; 9 would do"),
        ("dpo", {"beta": "high"}, "options.beta: must be a number, such as 0.1, not 'high'"),
        ("grpo", {"num_generations": "many"}, "options.num_generations: must be a number, such as 8, not 'many'"),
        ("grpo", {"num_generations": 0}, "options.num_generations: must be a whole number above 0, not 0"),
        ("grpo", {"max_completion_length": 128}, "128 tokens leave no room for a prompt in data.max_length=128"),
    ],
)
def test_options_of_a_kind(kind, options, reason, tmp_path):
    config = stream_of(tmp_path, kind)
    config["stream"]["tasks"][1]["options"] = options
    with pytest.raises(ConfigError, match=reason):
        check_training(prepared(config))


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"micro_batch_size": 1}, "training.micro_batch_size: task 'kto' is of kind kto, .* at least 2 rows"),
        ({"arguments": {"train_sampling_strategy": "random"}}, "train_sampling_strategy: .* leave it out"),
    ],
)
def test_rows_that_kto_could_not_mismatch_are_refused_before_the_run(training, reason, tmp_path):
    config = stream_of(tmp_path, "kto")
    config["training"] |= training
    with pytest.raises(ConfigError, match=reason):
        check_training(prepared(config))
    config["stream"]["tasks"][1]["options"]["loss_type"] = "apo_zero_unpaired"  # which mismatches none
    check_training(prepared(config))


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"kind": "grpo"}, "reward: says what an answer is worth"),
        ({"kind": "dpo", "reward": "exact_match"}, "reward: says what an answer is worth"),
        ({"options": {"beta": 1}}, "options: belong to a kind of stage that TRL trains"),
        ({"kind": "dpo", "instruction": "Say"}, "instruction: belongs to tasks of kind sft"),
        ({"kind": "grpo", "reward": "worth"}, "must be exact_match or module:function"),
        ({"kind": "dpp"}, "kind: .*dpp"),
    ],
)
def test_keys_of_a_kind(task, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        load_config(tiny_config(tmp_path) | {"stream": {"tasks": [{"name": "a", "path": "a"} | task]}})


def test_without_trl_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(ConfigError, match=r"pip install 'holdfast\[trl\]'"):
        prepared(stream_of(tmp_path, "dpo"))


def test_a_reward_is_called_as_trl_calls_it():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0] * len(prompts)

    asked = [{"role": "user", "content": "a?"}]
    rows = [{"prompt": asked, "least": 1}, {"prompt": asked, "most": [2, "3"]}]
    assert rewards(reward, rows, ["b", "c"], completion_ids=[[4], [5]]) == [1.0, 1.0]
    assert seen == {
        "prompts": [asked, asked],
        "completions": [[{"role": "assistant", "content": "b"}], [{"role": "assistant", "content": "c"}]],
        "least": [1, None],
        "most": [None, [2, "3"]],
        "completion_ids": [[4], [5]],
    }


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("nowhere:f", "reward: module 'nowhere' cannot be imported"),
        ("support.rewards:late_letters", "has no function 'late_letters'"),
    ],
)
def test_a_reward_that_is_not_there(reward, reason, tmp_path):
    config = stream_of(tmp_path, "grpo")
    config["stream"]["tasks"][1]["reward"] = reward
    with pytest.raises(ConfigError, match=reason):
        prepared(config)


def test_a_run_whose_record_names_a_reward_asks_for_trust(tmp_path):
    config = stream_of(tmp_path, "grpo", method="frozen")
    config["stream"]["tasks"][1]["reward"] = "support.rewards:early_letters"
    done(config)
    with pytest.raises(ConfigError, match=r"reward: runs the function support\.rewards:early_letters(.|\n)*--trust"):
        evaluate(tmp_path / "run")
    found = evaluate(tmp_path / "run", trust=True)
    score, before = found.scores["grpo"]
    assert score == before


def test_rewarded_rows_are_known_by_their_number(tmp_path):
    setup = prepared(stream_of(tmp_path, "grpo"))
    task, encoder, rows = setup.stream.tasks[1], setup.encoder, rewarded_rows()
    numbers = [row["prompt"] for row in trained_rows(task, encoder)]
    tokens, reward = prompt_tokens(task, encoder, 3), reward_of(task, encoder)
    assert [encoder.tokenizer.decode(tokens(number)) for number in numbers] == [row["prompt"] for row in rows]
    right = [f" {row['answer']}" for row in rows]
    assert reward(prompts=numbers[::-1], completions=right[::-1]) == [1.0] * len(rows)
    assert reward(prompts=numbers, completions=right[::-1]) == [
        float(a == b) for a, b in zip(right, right[::-1], strict=True)
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_each_kind_learns_what_it_is_measured_by(kind, tmp_path):
    config = stream_of(tmp_path, kind)
    config["stream"]["tasks"] = config["stream"]["tasks"][1:]
    if kind == "grpo":
        config["stream"]["tasks"][0]["reward"] = "support.rewards:early_letters"
    config["training"] |= {"epochs": 15, "save_every": 100, "learning_rate": 2e-2}
    folder = tmp_path / "tasks" / kind  # a model so small learns its rows by heart
    (folder / "test.json").write_text((folder / "train.json").read_text())
    [[before], [after]] = done(config)["scores"]
    assert after > 0.7 > before


def test_answers_that_are_all_worth_the_same_stop_no_run(tmp_path, caplog):
    """No weight moves, so that the penalty on moving is zero in all steps."""
    config = stream_of(tmp_path, "grpo", tuner="full", method="si")  # no answer of this model is right
    assert [row[1] for row in done(config)["scores"]] == [0, 0, 0]
    assert "stage 2 (grpo): the loss term 'si' was exactly zero in all 4 steps" in caplog.text


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "dpo",
            {"loss_type": "sigmiod"},
            r"task 'dpo': options\.loss_type: TRL's DPOTrainer has no 'sigmiod': .*'sigmoid'",
        ),
        ("kto", {"loss_type": "kot"}, r"options\.loss_type: TRL's KTOTrainer has no 'kot'"),
        ("grpo", {"loss_type": "gpro"}, r"options\.loss_type: TRL's GRPOTrainer has no 'gpro'"),
        (
            "dpo",
            {"f_divergence_type": "js_divergence", "loss_type": "apo_zero"},
            "task 'dpo': options: TRL's DPOTrainer does not take",
        ),
    ],
)
def test_what_trl_alone_knows_to_be_wrong_is_told_by_its_key(kind, options, said, tmp_path):
    config = stream_of(tmp_path, kind)
    [task] = config["stream"]["tasks"] = config["stream"]["tasks"][1:]
    task["options"] |= options
    with pytest.raises(ConfigError, match=said):
        done(config)
