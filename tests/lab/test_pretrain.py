"""Laboratory runs: equal to a plain loop, exact on resume, stopped by each condition, measured as defined."""

import json
import math
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.data.tokens.file import TokenFile
from holdfast.errors import ConfigError, DataError, RunDirectoryError
from holdfast.lab import pretrain as module
from holdfast.lab.architecture import architecture, counted_parameters, new_model
from holdfast.lab.config import SizeConfig, load_lab_config
from holdfast.lab.measure import weights_of
from holdfast.lab.mixture import Mixture
from holdfast.lab.pretrain import LabRun, LabWatch, pretrain
from holdfast.models.attention import FLOAT32
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from holdfast.training.checkpoint import newest_whole_checkpoint
from support import forked
from support.lab_runs import lab_config

QUIET = Progress(quiet=True)
BATCH, CONTEXT = 8, 16


def losses(model, ids):
    """Plain losses of each position, [rows, seq - 1]."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def test_training_equals_a_plain_loop(languages, pretrained):
    tokenizer = languages.tokenizer
    model = new_model(SizeConfig(width=32, depth=2, head_size=16), tokenizer, CONTEXT, seed=0)
    rows = TokenFile.open(languages.north).rows(CONTEXT)
    order = Mixture([rows], [1.0], 20 * BATCH, seed=0)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999))
    for step in range(20):
        ids = torch.stack([torch.as_tensor(order[step * BATCH + i]["input_ids"]) for i in range(BATCH)])
        logits = model(input_ids=ids).logits[:, :-1]
        F.cross_entropy(logits.transpose(1, 2), ids[:, 1:]).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / 4)  # 512 tokens of warm-up are 4 steps
        optimizer.step()
        optimizer.zero_grad()
    trained = AutoModelForCausalLM.from_pretrained(pretrained.path / "model")
    for (name, p), q in zip(model.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=name)


def test_what_is_measured_is_what_it_says(languages, pretrained):
    trained = AutoModelForCausalLM.from_pretrained(pretrained.path / "model")
    begun = new_model(SizeConfig(width=32, depth=2, head_size=16), languages.tokenizer, CONTEXT, seed=0)
    rows = TokenFile.open(languages.south_valid).rows(CONTEXT).batch(range(16))
    for model, found in ((begun, pretrained.result["start"]), (trained, pretrained.result["end"])):
        nll = losses(model, rows)
        assert found["domains"]["south"]["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
        assert found["domains"]["south"]["second_half"] == pytest.approx(nll[:, 7:].mean().item(), rel=1e-5)
        assert found["domains"]["south"]["kl"] is None
    one = torch.cat([p.flatten() for p in trained.parameters()])
    other = torch.cat([p.flatten() for p in begun.parameters()])
    assert found["weights"]["norm"] == pytest.approx(one.norm().item(), rel=1e-5)
    assert found["weights"]["from_start"] == pytest.approx((one - other).norm().item(), rel=1e-5)
    assert found["weights"]["from_init"] == found["weights"]["from_start"]
    assert pretrained.result["end"]["domains"]["north"]["loss"] < 0.8 * math.log(300)


def test_the_directory_holds_what_a_user_needs(languages, pretrained):
    path = pretrained.path
    assert {p.name for p in path.iterdir()} >= {"run.json", "events.jsonl", "evaluations.jsonl", "result.json", "model"}
    assert not (path / "checkpoint").exists()
    events = read_jsonl(path / "events.jsonl")
    assert [event["step"] for event in events] == list(range(1, 21))
    assert events[-1]["tokens"] == 20 * BATCH * CONTEXT
    assert [e["step"] for e in read_jsonl(path / "evaluations.jsonl")] == [0, 10, 20]
    assert AutoTokenizer.from_pretrained(path / "model")("bad")["input_ids"] == languages.tokenizer("bad")["input_ids"]
    assert pretrained.result["stop"] == "tokens"
    assert not [p for p in path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_going_on_knows_where_the_weights_began(languages, pretrained, tmp_path):
    config = lab_config(languages, tmp_path / "south", model=str(pretrained.path / "model"), data=str(languages.south))
    result = pretrain(config, QUIET)
    start = result["start"]
    before = pretrained.result["end"]
    assert start["domains"]["south"]["loss"] == pytest.approx(before["domains"]["south"]["loss"], rel=1e-5)
    assert start["domains"]["south"]["kl"] == pytest.approx(0, abs=1e-6)
    assert start["weights"]["from_start"] == 0
    assert start["weights"]["from_init"] == pytest.approx(before["weights"]["from_start"], rel=1e-5)
    assert result["end"]["domains"]["south"]["loss"] < start["domains"]["south"]["loss"]
    assert result["end"]["domains"]["north"]["kl"] > 0.01
    assert read_json(tmp_path / "south" / "model" / "lab.json")["tokens"] == 2 * 20 * BATCH * CONTEXT
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (pretrained.path / "model", tmp_path / "south/model")
    )
    ids = TokenFile.open(languages.north_valid).rows(CONTEXT).batch(range(16))
    with torch.no_grad():
        p, q = (F.log_softmax(m(input_ids=ids).logits[:, :-1], -1) for m in (teacher, student))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert result["end"]["domains"]["north"]["kl"] == pytest.approx(kl, rel=1e-4)


def test_lora_moves_from_its_start_and_saves_an_adapter(languages, pretrained, tmp_path):
    config = lab_config(
        languages,
        tmp_path / "lora",
        model=str(pretrained.path / "model"),
        data=str(languages.south),
        tuner={"name": "lora", "r": 2, "lora_dropout": 0.0},
    )
    result = pretrain(config, QUIET)
    assert result["start"]["weights"]["from_start"] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "adapter")
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(pretrained.path / "model")
    whole = PeftModel.from_pretrained(plain, tmp_path / "lora" / "adapter").merge_and_unload()
    first = AutoModelForCausalLM.from_pretrained(pretrained.path / "model")
    moved = math.sqrt(
        sum(float((a - b).square().sum()) for a, b in zip(whole.parameters(), first.parameters(), strict=True))
    )
    assert moved > 0
    assert result["end"]["weights"]["from_start"] == pytest.approx(moved, rel=1e-3)
    assert merged is not None


@pytest.mark.parametrize(
    ("stop", "why"),
    [
        ({"tokens": 1280}, "tokens"),
        ({"tokens_per_parameter": 0.05}, "tokens_per_parameter"),
        ({"epochs": 0.1}, "epochs"),
        ({"tokens": 12800, "loss": 4.5}, "loss"),
        ({"loss": 4.5}, "loss"),
        ({"patience": 2, "domain": "south"}, "patience"),
        ({"seconds": 0.2}, "seconds"),
    ],
)
def test_each_condition_ends_training(languages, tmp_path, stop, why):
    config = lab_config(languages, tmp_path / "run", stop=stop)
    config["evaluation"] = {"every": BATCH * CONTEXT, "rows": 16}
    result = pretrain(config, QUIET)
    assert result["stop"] == why
    evaluations = read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert evaluations[-1]["step"] == result["step"]
    series = [e["domains"]["north"]["loss"] for e in evaluations]
    if why == "tokens":
        assert result["tokens"] == 1280
    elif why == "tokens_per_parameter":
        assert result["tokens"] == pytest.approx(0.05 * result["parameters"], abs=BATCH * CONTEXT / 2)
    elif why == "epochs":
        rows = len(TokenFile.open(languages.north).rows(CONTEXT))
        assert result["step"] == round(0.1 * rows / BATCH)
    elif why == "loss":
        assert series[-1] <= 4.5 < min(series[:-1])
    elif why == "patience":
        south = [e["domains"]["south"]["loss"] for e in evaluations]
        assert len(south) - 1 - south.index(min(south)) == 2
        assert result["best"]["domains"]["south"]["loss"] == min(south)
    else:
        assert result["seconds"] >= 0.2


def test_schedules_rise_and_fall(languages, tmp_path):
    rates = {}
    for schedule in ("constant", "cosine", "wsd"):
        config = lab_config(languages, tmp_path / schedule)
        config["training"] |= {"schedule": schedule, "decay": 0.5}
        pretrain(config, QUIET)
        rates[schedule] = [event["learning_rate"] for event in read_jsonl(tmp_path / schedule / "events.jsonl")]
    for values in rates.values():
        assert values[0] < values[3] <= values[4] == pytest.approx(1e-2, rel=1e-2)
    assert rates["constant"][-1] == 1e-2
    assert rates["cosine"][-1] < 1e-4
    assert rates["wsd"][9] == 1e-2
    assert rates["wsd"][-1] < 2e-3


class DiedError(Exception):
    pass


@pytest.mark.parametrize(
    "dies_at", [pytest.param(3, marks=pytest.mark.slow), 10, pytest.param(13, marks=pytest.mark.slow), 20]
)
def test_a_run_that_died_goes_on_to_the_same_end(languages, tmp_path, monkeypatch, dies_at):
    def config(name):
        changed = lab_config(
            languages,
            tmp_path / name,
            data=[{"path": str(languages.north), "weight": 3}, str(languages.south)],
            tuner={"name": "lora", "r": 2},  # with dropout, so that random states matter
            stop={"tokens": 20 * BATCH * CONTEXT, "patience": 5, "domain": "south"},
        )
        changed["training"] |= {"save_every": 4, "micro_batch_size": 4}
        return changed

    unbroken = pretrain(config("unbroken"), QUIET)
    measure, on_log = LabRun.measure, LabWatch.on_log

    def dying_measure(run, step):
        if step == dies_at:
            raise DiedError
        measure(run, step)

    def dying_log(watch, args, state, *others, **kwargs):
        if state.global_step == dies_at:
            raise DiedError
        on_log(watch, args, state, *others, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LabRun, "measure", dying_measure)
        patch.setattr(LabWatch, "on_log", dying_log)
        with pytest.raises(DiedError):
            pretrain(config("broken"), QUIET)
    resumed = pretrain(config("broken"), QUIET)
    assert pretrain(config("broken"), QUIET) == resumed
    for name in ("evaluations.jsonl", "events.jsonl"):
        one, other = (timeless(read_jsonl(tmp_path / folder / name)) for folder in ("unbroken", "broken"))
        assert one == other
    assert timeless([resumed]) == timeless([unbroken])
    one, other = (tmp_path / folder / "adapter/adapter_model.safetensors" for folder in ("unbroken", "broken"))
    assert one.read_bytes() == other.read_bytes()


def timeless(lines):
    """Lines without what the clock decides."""
    text = json.dumps(lines)
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k not in CLOCK})


CLOCK = ("seconds", "tokens_per_second")


def test_a_signal_saves_and_the_command_goes_on(languages, tmp_path):
    config = lab_config(languages, tmp_path / "run", stop={"tokens": 200 * BATCH * CONTEXT})
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    command = "-m", "holdfast", "lab", "pretrain", path
    process = forked.start(*command)
    events = tmp_path / "run" / "events.jsonl"
    while process.poll() is None and not (events.exists() and len(events.read_text().splitlines()) > 5):
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Continue with: holdfast lab pretrain" in errors
    done = len(read_jsonl(events))
    assert 5 < done < 200
    assert forked.run(*command, "stop.tokens=25600").returncode == 0
    assert [event["step"] for event in read_jsonl(events)] == list(range(1, 201))


def together(config):
    return forked.start_together(2, "-m", "holdfast", "lab", "pretrain", config)


def ended(processes):
    """Exit codes and what the first process said on standard error; a hang fails."""
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said[0]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_of_two_processes_stops_both_and_they_go_on_to_the_same_end(languages, tmp_path, rank):
    paths = {}
    for name in ("unbroken", "broken"):
        config = lab_config(languages, tmp_path / name, stop={"tokens": 100 * BATCH * CONTEXT})
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(json.dumps(config), encoding="utf-8")
    assert ended(together(paths["unbroken"]))[0] == [0, 0]
    processes = together(paths["broken"])
    events = tmp_path / "broken" / "events.jsonl"
    while all(process.poll() is None for process in processes) and not (events.exists() and events.read_text()):
        time.sleep(0.01)
    processes[rank].send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [1, 1] and "Continue with: holdfast lab pretrain" in said
    checkpoint = newest_whole_checkpoint(tmp_path / "broken" / "checkpoint")
    assert checkpoint.name == f"checkpoint-{len(read_jsonl(events))}"
    assert len(read_jsonl(events)) < 100
    assert ended(together(paths["broken"]))[0] == [0, 0]
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in paths)
    assert one.read_bytes() == other.read_bytes()


def test_micro_batches_change_nothing(languages, pretrained, tmp_path):
    config = lab_config(languages, tmp_path / "micro")
    config["training"] |= {"micro_batch_size": 2}
    result = pretrain(config, QUIET)
    one, other = result["end"]["domains"]["north"], pretrained.result["end"]["domains"]["north"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing_learn_the_same(languages, pretrained, tmp_path, change):
    config = lab_config(languages, tmp_path / "run")
    config["training"] |= change
    result = pretrain(config, QUIET)
    one, other = result["end"]["domains"]["north"], pretrained.result["end"]["domains"]["north"]
    assert one["loss"] == pytest.approx(other["loss"], rel=0.03)


ENGINES = ["ddp", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("fsdp2", "zero1", "zero2", "zero3"))]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(engine, languages, pretrained, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    config = lab_config(languages, tmp_path / "two")
    config["training"]["engine"] = engine
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    codes, said = ended(together(path))
    assert codes == [0, 0], said
    one, two = pretrained.path, tmp_path / "two"
    for a, b in zip(*(read_jsonl(p / "evaluations.jsonl") for p in (one, two)), strict=True):
        assert a["domains"]["north"]["loss"] == pytest.approx(b["domains"]["north"]["loss"], rel=1e-4)
        assert a["weights"] == pytest.approx(b["weights"], rel=1e-4)
    for a, b in zip(*(AutoModelForCausalLM.from_pretrained(p / "model").parameters() for p in (one, two)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_each_sequence_once_in_an_epoch_and_shares_at_any_point(languages):
    north, south = (TokenFile.open(folder).rows(CONTEXT) for folder in (languages.north, languages.south))
    alone = Mixture([north], [1.0], 3 * len(north), seed=1)
    epochs = [[alone.source(e * len(north) + i)[1] for i in range(len(north))] for e in range(3)]
    assert all(sorted(epoch) == list(range(len(north))) for epoch in epochs)
    assert epochs[0] != epochs[1]
    both = Mixture([north, south], [127, 1], 1 << 40, seed=1)
    for length in (1, 100, 128, 1000, 70_000):
        ones = sum(both.source(place)[0] == 1 for place in range(length))
        assert abs(ones - length / 128) <= 1
    turns = [both.source(place) for place in range(2000)]
    seen = [row for part, row in turns if part == 1]
    assert len(set(seen)) == len(seen)
    again = Mixture([north, south], [127, 1], 10, seed=1)
    assert [again.source(i) for i in range(10)] == turns[:10]
    assert torch.equal(torch.as_tensor(both[5]["input_ids"]), torch.as_tensor(north[turns[5][1]]["input_ids"]))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sizes(languages, family):
    model = new_model(SizeConfig(family=family, width=64, depth=3, head_size=16), languages.tokenizer, CONTEXT, 0)
    assert model.config.num_attention_heads == 4
    assert counted_parameters(model) == pytest.approx(12 * 3 * 64**2 + 64 * 300, rel=0.02)
    tied = SizeConfig(family=family, width=64, depth=3, head_size=16, tie_embeddings=True)
    assert counted_parameters(new_model(tied, languages.tokenizer, CONTEXT, 0)) == counted_parameters(model)
    same = new_model(SizeConfig(family=family, width=64, depth=3, head_size=16), languages.tokenizer, CONTEXT, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model).values(), weights_of(same).values(), strict=True))
    config = architecture(SizeConfig(family=family, parameters=5_000_000), 4096, 128)
    found = config.hidden_size * 4096 + 12 * config.num_hidden_layers * config.hidden_size**2
    assert found == pytest.approx(5e6, rel=0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"width": 40, "depth": 2, "head_size": 16}}, "32 or 48 would be"),
        ({"model": {"width": 32}}, "width and depth go together"),
        ({"model": {"parameters": 100}}, "the model nearest to 100"),
        ({"stop": {"tokns": 5}}, "did you mean 'tokens'"),
        ({"stop": {}}, "at least one of"),
        ({"stop": {"loss": 3.0}, "valid": {}}, "give `valid`"),
        ({"stop": {"loss": 3.0, "domain": "east"}}, "'east' is not in `valid`"),
        ({"stop": {"loss": 3.0}, "training": {"schedule": "cosine"}}, "must know the end"),
        ({"training": {"batch_size": 6, "micro_batch_size": 4}}, "not a multiple"),
        ({"training": {"arguments": {"nonsense": 1}}}, "nonsense"),
        ({"model": "nowhere/model"}, "nowhere/model"),
        ({"context": 100_000}, "100"),
        ({"method": "o_lora"}, "tuner"),
    ],
)
def test_bad_configurations_are_refused_with_the_reason(languages, tmp_path, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        pretrain(lab_config(languages, tmp_path / "run", **changes), QUIET)
    assert not (tmp_path / "run" / "result.json").exists()


def test_another_configuration_in_the_same_directory_is_refused(languages, pretrained):
    with pytest.raises(RunDirectoryError, match="context: 16 -> 8"):
        pretrain(lab_config(languages, pretrained.path, context=8), QUIET)


def test_configuration_takes_overrides():
    config = load_lab_config(
        {"model": "m", "data": "a", "stop": {"tokens": 5}, "output": "o"}, ["training.learning_rate=0.5", "seed=3"]
    )
    assert (config.training.learning_rate, config.seed, config.data[0].path) == (0.5, 3, "a")
    assert module.LabTrainer.__name__ == "ContinualInOrder"


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_float32_is_sdpa(languages, padded):
    size = SizeConfig(width=32, depth=2, head_size=16)
    ids = torch.randint(3, 200, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    results = []
    for attention in ("sdpa", FLOAT32):
        model = new_model(size, languages.tokenizer, CONTEXT, 0, attention)
        model(input_ids=ids, attention_mask=mask).logits[mask.bool()].square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_how_attention_is_computed_is_not_saved(languages, tmp_path):
    config = lab_config(languages, tmp_path / "run", stop={"tokens": BATCH * CONTEXT})
    config["training"] |= {"precision": "bfloat16"}
    pretrain(config, QUIET)
    assert "attn" not in (tmp_path / "run" / "model" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config._attn_implementation == "sdpa"
