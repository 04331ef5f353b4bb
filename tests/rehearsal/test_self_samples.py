"""Samples of the model itself: what it is asked with, and what training gets of them while it runs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from holdfast.api.stage import Rehearsed, Step
from holdfast.data.tokens.file import build_tokens
from holdfast.engines.process import Process
from holdfast.errors import ConfigError
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.losses import kl_divergence
from holdfast.losses.next_token import predicting
from holdfast.methods.rehearsal import Rehearsal
from holdfast.models.sampling import sample
from holdfast.rehearsal.buffer import HELD_OUT, SampleBuffer, drawn_states_are_exact
from holdfast.rehearsal.request import Request, SampleOptions
from holdfast.rehearsal.teacher import LiveStates
from holdfast.runner.run import run
from holdfast.system.progress import Progress, silent
from support.families import FAMILIES, family_model, family_tokenizer
from support.rehearsed import two_stages
from support.shown import recorded
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage, tiny_tokenizer
from support.trained import vector

CHATS = [name for name, family in FAMILIES.items() if family.template]


def wild_model(**changes):
    """A model whose next tokens are far from uniform."""
    return tiny_model(initializer_range=0.25, **changes)


def stage_of(model, rows=4, **changes):
    stage = tiny_stage(model, tiny_rows(rows))
    stage.tokenizer, stage.rows_a_step = tiny_tokenizer(), 8
    for key, value in changes.items():
        setattr(stage, key, value)
    return stage


def shake(model, size=0.1):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))


def test_a_sample_begins_with_a_domain_or_the_begin_token_and_is_as_long_as_asked():
    tokenizer = train_tokenizer(["some text"] * 9, 300, domains=["eng", "spa"])
    model = tiny_model(vocab_size=300)
    assert Request.of(tokenizer, 128, begin=4).start == (4,) and Request.of(tokenizer, 128, begin=5).start == (0,)
    for options, first in (({}, 0), ({"domain": "spa"}, 4), ({"domain": "<|eng|>"}, 3), ({"token": 7}, 7)):
        request = Request.of(tokenizer, 128, options=SampleOptions(length=10, **options))
        for own in request.write(partial(sample, model), "seed", range(3)):
            ids, labels = own.row["input_ids"], own.row["labels"]
            assert len(ids) == 10 and ids[0] == first and labels == [-100, *ids[1:]]
    assert [Request.of(tokenizer, context).length for context in (128, 4096, None)] == [128, 1024, 1024]
    tokenizer.bos_token = None
    assert Request.of(tokenizer, 128).start == (1,) and Request.of(tokenizer, 128, begin=9).start == (9,)


def test_samples_begin_with_several_domains_in_turn():
    tokenizer = train_tokenizer(["some text"] * 9, 300, domains=["eng", "spa"])
    request = Request.of(tokenizer, 128, options=SampleOptions(length=6, domain=["spa", "eng"]))
    own = request.write(partial(sample, tiny_model(vocab_size=300)), "seed", range(3, 7))
    assert [one.row["input_ids"][0] for one in own] == [3, 4, 3, 4]


@pytest.mark.parametrize("family", CHATS)
def test_a_chat_is_the_template_around_words_and_an_answer(family):
    """The words that the model draws for the user end with the template's end of turn, or are cut; then the answer is
    drawn."""
    model, tokenizer = family_model(family, vocab_size=80), family_tokenizer(family)
    request = Request.of(tokenizer, 128, options=SampleOptions(length=60))
    own = request.write(partial(sample, model), "seed", range(80), hidden=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "WORDS"}], tokenize=False, add_generation_prompt=True
    )
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split("WORDS"))
    half = len(before) + (60 - len(before) - len(after) + 1) // 2
    whole = cut = 0
    for sampled in own:
        ids, labels = sampled.row["input_ids"], sampled.row["labels"]
        assert ids[: len(before)] == before and len(ids) <= 60
        drawn = [i for i, label in enumerate(labels) if label != -100]
        assert [labels[i] for i in drawn] == [ids[i] for i in drawn]
        if drawn == list(range(len(before), len(ids))):
            assert ids[-1] in request.stops and len(ids) <= half  # they ended as a text does
            continue
        ended = after[0] in ids[len(before) : half]
        whole, cut = whole + ended, cut + (not ended)
        end = ids.index(after[0], len(before)) if ended else half
        assert ids[end : end + len(after)] == after
        assert drawn == [*range(len(before), end + ended), *range(end + len(after), len(ids))]
        assert set(ids[end + len(after) : -1]).isdisjoint(request.stops) and len(ids) > end + len(after)
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        log_probs = outputs.logits[0].double().log_softmax(-1)
        assert sampled.log_prob == pytest.approx(float(sum(log_probs[i - 1, ids[i]] for i in drawn)), abs=1e-3)
        torch.testing.assert_close(sampled.hidden, outputs.hidden_states[-1][0, :-1], rtol=1e-3, atol=1e-3)
    assert whole > 5 and cut > 5
    part = request.write(partial(sample, model), "seed", [7, 3])
    assert [one.row for one in part] == [own[7].row, own[3].row]


def plain(**changes):
    tokenizer = tiny_tokenizer()
    for key, value in changes.items():
        setattr(tokenizer, key, value)
    return tokenizer


BARE = (
    "{% for m in messages %}{{ 'q: ' + m.content + ' a: ' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)
ASKED_WRONG = {
    "a domain that is not there": ({"domain": "enf"}, {}, "no token <|enf|> or 'enf'"),
    "no first token": ({}, {"bos_token": None, "eos_token": None}, "name the token that a sample begins with"),
    "no template": ({"chat": True}, {}, "no chat template"),
    "a template without ends": ({"chat": True}, {"chat_template": BARE}, "no special token after the user's words"),
    "a domain in a chat": ({"chat": True, "domain": "e"}, {"chat_template": BARE}, "takes no domain"),
    "beyond the context": ({"length": 129}, {}, "129 is more than the model's context of 128"),
    "no domain among several": ({"domain": []}, {}, "domain: names none; leave it out"),
    "a domain and a token": ({"domain": "e", "token": 5}, {}, "prompt token: .* leave one of them out"),
    "a temperature without end": ({"temperature": float("inf")}, {}, "inf cannot divide logits"),
    "no room": ({"length": 1}, {}, "leaves no room beside the 1 tokens"),
}


@pytest.mark.parametrize("case", ASKED_WRONG)
def test_what_cannot_be_asked_is_refused(case):
    options, tokenizer, reason = ASKED_WRONG[case]
    with pytest.raises(ConfigError, match=reason.replace("|", r"\|").replace("<", ".")):
        Request.of(plain(**tokenizer), 128, options=SampleOptions(**options))


def test_what_a_step_gets_depends_on_seed_stage_and_step_alone():
    """Neither earlier draws nor later changes of the model have an influence."""
    model = wild_model()
    request = Request.of(tiny_tokenizer(), 128, options=SampleOptions(length=12))
    before = LiveStates(model, -1)
    start = vector(model)

    def buffer(seed="1/1/x"):
        return SampleBuffer(request, before, seed, count=3, steps=4, hidden=False, bar=silent)

    whole = buffer()
    steps = [whole.rows(step, 3)[0] for step in range(10)]
    shake(model)
    now = vector(model)
    late = buffer()
    assert late.rows(7, 3)[0] == steps[7] and late.rows(2, 2)[0] == steps[2][:2]
    assert torch.equal(vector(model), now) and not torch.equal(now, start)
    assert len({tuple(row["input_ids"]) for rows in steps for row in rows}) == 30
    assert buffer("1/2/x").rows(0, 3)[0] != steps[0]


def test_what_is_drawn_is_told_token_by_token():
    model, (bar, told) = tiny_model(), recorded()
    request = Request.of(tiny_tokenizer(), 128, options=SampleOptions(length=5))
    SampleBuffer(request, LiveStates(model, -1), "1", count=2, steps=2, hidden=False, bar=bar).rows(0, 2)
    assert told == [("the model writes samples of itself, to rehearse", done, 5) for done in (0, 1, 2, 3, 5)]


def test_processes_share_the_samples_that_one_would_have(monkeypatch):
    """A step's, whether their number is given or a ratio; so that two processes learn what one does."""
    for options in ({"count": 6}, {"ratio": 0.75}):
        found = []
        for rank, world in ((0, 1), (0, 2), (1, 2)):
            monkeypatch.setattr(Process, "this", classmethod(lambda cls, r=rank, w=world: cls(r, w)))
            method = Rehearsal(source="self", length=12, buffer=2, **options)
            stage = stage_of(wild_model(), rows_a_step=8)
            method.before_stage(stage)
            found.append(method.extra_rows(Step(stage, 3, 8, 1, True)).rows)
        assert len(found[0]) == 6 and found[1] == found[0][::2] and found[2] == found[0][1::2]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_teacher_that_comes_with_the_samples_is_the_true_one(adapted, tmp_path):
    """The term and its gradient are those of KL to a copy of the model from before the stage; where an adapter is
    trained, nothing but the adapter is kept twice."""
    model = wild_model(tie_word_embeddings=False)
    if adapted:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    method, stage = Rehearsal(source="self", loss="kl", length=12, count=3, buffer=2), stage_of(model)
    method.before_stage(stage)
    assert drawn_states_are_exact(method.buffer.request, stage)
    with torch.no_grad():
        rows = method.extra_rows(Step(stage, 3, 8, 1, True))
        batch = pad_rows(rows.rows)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        old = model.eval()(**inputs).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = method.buffer.before.weights
    assert sum(t.numel() for t in kept) == sum(p.numel() for p in trained)
    shake(model)
    outputs = model(**inputs, output_hidden_states=True)
    step = Step(stage, 3, 8, 1, True)
    step.rehearsed = {
        "rehearsal": Rehearsed(rows.samples, batch["labels"], None, (outputs.hidden_states[-1],), 1.0, batch=batch)
    }
    [term] = method.loss_terms(step, {}, None).values()
    total, count = kl_divergence(outputs.logits, old, predicting(batch["labels"]))
    assert term > 1e-3
    torch.testing.assert_close(term, total / count, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(value, trained, retain_graph=True) for value in (term, total / count)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_where_the_states_of_drawing_are_others_the_teacher_runs_live():
    """A model whose hidden states are not what its decoder gives below the head."""
    model = wild_model()
    method, stage = Rehearsal(source="self", loss="kl", length=12), stage_of(model)
    stage.hidden_states = lambda rows, layer=-1: [torch.randn(12, 16)]
    method.before_stage(stage)
    assert not method.buffer.hidden and method.teacher.states is method.buffer.before


@pytest.mark.parametrize(
    ("loss", "way"), [("ce", "beside"), ("kl", "beside"), ("l1", "beside"), ("l2", "beside"), ("ce", "replace")]
)
def test_every_loss_trains_on_drawn_samples(loss, way, tmp_path):
    method = Rehearsal(source="self", loss=loss, way=way, length=10, buffer=2)
    trainer = two_stages(tmp_path, method)
    terms = [log.get("term/rehearsal") for log in trainer.state.log_history if "loss" in log]
    if way == "replace":
        assert terms == [None] * 3
    else:
        assert terms[0] == pytest.approx(0, abs=1e-6) or loss == "ce"
        assert terms[-1] > 1e-6
    assert method.buffer is None and method.teacher is None


def test_a_report_of_forgetting_on_samples_that_were_held_out(tmp_path):
    method = Rehearsal(source="self", loss="kl", length=10)
    trainer = two_stages(tmp_path, method)
    report = trainer.forgetting_report()
    assert report["texts"] == HELD_OUT
    assert report["change"] == pytest.approx(report["after"] - report["before"]) and report["change"] != 0


def test_a_run_draws_no_samples_for_a_report_that_nobody_asks_for(monkeypatch, tmp_path):
    def drawn(*args):
        raise AssertionError("samples are held out")

    monkeypatch.setattr("holdfast.methods.rehearsal.held_out", drawn)
    config = tiny_config(tmp_path, method={"name": "kl_replay", "length": 6})
    run(config | {"training": config["training"] | {"max_steps": 1}}, Progress(quiet=True))
    with pytest.raises(AssertionError, match="held out"):
        two_stages(tmp_path, Rehearsal(source="self", loss="kl", length=6))


def test_switched_off_it_draws_nothing_and_keeps_nothing(monkeypatch):
    monkeypatch.setattr("holdfast.rehearsal.buffer.sample", None)
    method, stage = Rehearsal(source="self", loss="kl", weight=0), stage_of(wild_model())
    method.before_stage(stage)
    assert method.buffer is None and method.teacher is None and method.extra_rows(Step(stage, 0, 8, 1, True)) is None


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("\n".join(f"line {i} of the text holds number {i * i}" for i in range(200)))
    tokenizer = tiny_tokenizer()
    build_tokens([folder / "text.txt"], folder / "tokens", tokenizer)
    return folder / "tokens"


def test_a_token_file_is_read_row_by_row(token_file, monkeypatch):
    """Rows of the model's context; those of a step are read and no others, and the held out are never rehearsed."""
    model = tiny_model(max_position_embeddings=16)
    method, stage = Rehearsal(source="general", loss="kl", path=str(token_file), count=5), stage_of(model)
    method.before_stage(stage)
    file = method.rows
    assert len(file) > 300 and method.size == len(file) - len(method.held_out) and len(method.held_out) > 20
    read, getitem = [], type(file).__getitem__
    monkeypatch.setattr(type(file), "__getitem__", lambda self, i: read.append(i) or getitem(self, i))
    numbers = []
    for index in range(40):
        extra = method.extra_rows(Step(stage, index, 8, 1, True))
        assert len(extra.rows) == 5 and len(extra.rows[0]["input_ids"]) == 16
        numbers += extra.samples
    assert read == numbers and max(numbers) < method.size and len(set(numbers)) > 100
    assert isinstance(method.teacher.states, LiveStates)


def test_a_part_of_a_token_file_where_fewer_are_asked_for_or_each_must_be_seen_before(token_file, tmp_path):
    for options in ({"samples": 20}, {"samples": 20, "loss": "margin"}, {"loss": "l2", "teacher": "start"}):
        method, stage = Rehearsal(source="general", path=str(token_file), **options), stage_of(tiny_model())
        stage.folder = tmp_path / str(len(options)) / options.get("loss", "ce")
        method.before_stage(stage)
        assert len(method.rows) == method.size == (20 if "samples" in options else len(method.rows))
        assert not isinstance(getattr(method.teacher, "states", None), LiveStates)


def test_rows_of_a_token_file_train_with_a_live_teacher(token_file, tmp_path):
    method = Rehearsal(source="general", loss="kl", path=str(token_file))
    trainer = two_stages(tmp_path, method)
    terms = [log["term/rehearsal"] for log in trainer.state.log_history if "loss" in log]
    assert terms[0] == pytest.approx(0, abs=1e-6) and terms[-1] > 1e-6
    assert not (tmp_path / "rehearsal").exists()
