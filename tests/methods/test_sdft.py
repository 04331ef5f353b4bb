"""SDFT: what the teacher reads, the loss on the model's own answers, and the average of the weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import TrainerCallback

from holdfast.api.rows import last_answer
from holdfast.api.stage import Rehearsed, Step
from holdfast.api.task import Example, Turn
from holdfast.config.run import load_config
from holdfast.data.collate import pack
from holdfast.data.encode import Encoder
from holdfast.errors import ConfigError, DataError
from holdfast.methods import build
from holdfast.methods.sdft import SDFT, SHOWN
from holdfast.rehearsal.demonstration import Demonstration
from holdfast.runner.setup import prepare, resolve
from support.families import FAMILIES, family_tokenizer
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage, tiny_tokenizer
from support.trained import trained

SHORT = " ={demonstration}= "
CHATS = [name for name, family in FAMILIES.items() if family.template]


def wild_model(**changes):
    """A model whose next tokens are far from uniform."""
    return tiny_model(initializer_range=0.25, **changes)


def stage_of(model, count=5):
    stage = tiny_stage(model, tiny_rows(count), micro_batch_size=3)
    stage.tokenizer = tiny_tokenizer()
    return stage


def shake(model, size=0.02):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def step_of(stage, index=0, size=3):
    batches = [pad_rows(stage.rows[start : start + size]) for start in range(0, len(stage.rows), size)]
    return Step(stage, index, len(stage.rows), len(batches), True, batches=batches)


def loss_of(method, step, model):
    """What a trainer would add to the loss: the mean over micro-batches."""
    extra, total, first = method.extra_rows(step), 0.0, 0
    for batch in step.batches:
        rows = extra.rows[first : first + len(batch["input_ids"])]
        collated, samples = pad_rows(rows), list(range(first, first + len(rows)))
        logits = model(input_ids=collated["input_ids"], attention_mask=collated["attention_mask"]).logits
        step.rehearsed = {"sdft": Rehearsed(samples, collated["labels"], logits, (), 1.0)}
        total = total + method.loss_terms(step, batch, None)["sdft"] / step.micro_batches
        first += len(rows)
    return extra.rows, total


def plain_loss(rows, answered, model, teacher, method):
    """The same of one token after another, and only with forward passes of single rows."""
    tokenizer, options, terms = tiny_tokenizer(), method.options, []
    for row, own in zip(rows, answered, strict=True):
        half = row["labels"].count(-100)
        prompt, answer = row["input_ids"][:half], own["input_ids"][half:]
        assert own["input_ids"][:half] == prompt and own["labels"] == [-100] * half + answer
        said = tokenizer.decode(row["input_ids"][half:]).strip()
        shown = prompt + tokenizer(options.shown.format(demonstration=said), add_special_tokens=False)["input_ids"]
        for place in range(options.skip, len(answer)):
            p = model(torch.tensor([prompt + answer[:place]])).logits[0, -1].softmax(-1)
            with torch.no_grad():
                q = teacher(torch.tensor([shown + answer[:place]])).logits[0, -1].softmax(-1)
            one, other = (p, q) if options.direction == "reverse" else (q, p)
            terms.append((one * (one / other).log()).sum())
    return torch.stack(terms).sum() / len(terms)


@pytest.mark.parametrize("options", [{}, {"skip": 2}, {"direction": "forward"}])
def test_the_loss_and_its_gradient_are_those_of_a_plain_loop(options):
    model = wild_model().double()
    stage, method = stage_of(model), SDFT(shown=SHORT, max_new_tokens=7, **options)
    method.before_stage(stage)
    method.extra_rows(step_of(stage))  # the average begins with the first step
    teacher = copy.deepcopy(model).float().double().eval()  # it is kept in float32
    shake(model)
    before = copy.deepcopy(model.state_dict())
    rows, loss = loss_of(method, step_of(stage, index=1), model)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    expected = plain_loss(stage.rows, rows, model, teacher, method)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and loss.item() > 1e-3
    parameters = list(model.parameters())
    for found, right in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)  # norms are float32


def test_answers_depend_on_seed_stage_and_step_and_not_on_micro_batches():
    stage, method = stage_of(wild_model()), SDFT(shown=SHORT, max_new_tokens=9)
    method.before_stage(stage)
    first = method.extra_rows(step_of(stage)).rows
    assert method.extra_rows(step_of(stage)).rows == first
    torch.rand(3)
    stage.micro_batch_size = 1
    assert method.extra_rows(step_of(stage, size=1)).rows == first
    assert method.extra_rows(step_of(stage, index=1, size=1)).rows != first
    stage.index = 2
    assert method.extra_rows(step_of(stage, size=1)).rows != first
    lengths = {len(last_answer(row)[1]) for row in first}
    assert max(lengths) <= 9 and all(2 not in last_answer(row)[1][:-1] for row in first)  # the end token ends an answer


class Watching(TrainerCallback):
    """The trained weights after each step, and the method's average of them."""

    def __init__(self, method):
        self.method, self.seen = method, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        average = {name: t.double().clone() for name, t in self.method.average.tensors.items()}
        self.seen.append((weights, average))


@pytest.mark.parametrize("ema", [0.0, 0.1, 1.0])
def test_the_teacher_is_the_average_of_the_weights_after_each_step(ema, tmp_path):
    method, model = SDFT(shown=SHORT, max_new_tokens=4, ema=ema), wild_model()
    average = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    watching = Watching(method)
    given = {"rows": tiny_rows(10), "model": model, "method": method, "processing_class": tiny_tokenizer()}
    trainer = trained(tmp_path, **given, callbacks=[watching], args={"gradient_accumulation_steps": 2, "max_steps": 3})
    assert len(watching.seen) == 3 and method.average is None
    for weights, found in watching.seen:
        for name, w in weights.items():
            average[name] = (1 - ema) * average[name] + ema * w
            torch.testing.assert_close(found[name], average[name], rtol=1e-6, atol=1e-7)
    logs = [line for line in trainer.state.log_history if "term/sdft" in line]
    assert len(logs) == 3 and all(line["term/task"] == 0 and line["sdft/answer_tokens"] > 0 for line in logs)
    assert all(line["loss"] == pytest.approx(line["term/sdft"], rel=1e-3) and line["loss"] > 0 for line in logs)


@pytest.mark.parametrize("family", CHATS)
def test_in_a_chat_the_answer_is_shown_after_the_users_words(family):
    tokenizer = family_tokenizer(family)
    encoder = Encoder(tokenizer, max_length=10_000)
    turns = (Turn("user", "how many?"), Turn("assistant", "12 of them"))
    earlier = (Turn("user", "hello"), Turn("assistant", "hello you"))
    for before in ((), earlier):
        row = encoder.encode(Example("", 0, (*before, *turns)))[-1]
        shown = Demonstration(tokenizer, " so: {demonstration}, and now?").show(row)
        asked = Turn("user", "how many? so: 12 of them, and now?")
        expected = encoder.prompt(Example("", 0, (*before, asked, turns[1])), 0)
        assert shown.prompt == encoder.prompt(Example("", 0, (*before, *turns)), 0)
        assert tokenizer.decode(shown.demonstrated) == tokenizer.decode(expected)


def test_in_plain_text_it_stands_after_the_prompt():
    tokenizer = tiny_tokenizer()
    [row] = Encoder(tokenizer, max_length=128).encode(
        Example("", 0, (Turn("user", "red: ab?"), Turn("assistant", "r")))
    )
    shown = Demonstration(tokenizer, SHORT).show(row)
    assert tokenizer.decode(shown.prompt) == "red: ab?"
    assert tokenizer.decode(shown.demonstrated) == "red: ab? =r= "


def test_the_default_is_the_papers_text():
    assert "This is an example for a response to the question:\n{demonstration}\n\nNow answer with a response" in SHOWN
    with pytest.raises(ConfigError, match=r"shown: must have \{demonstration\} in it, once"):
        SDFT(shown="look at it")


def test_what_cannot_work_is_refused_with_the_reason_before_training(tmp_path):
    given = {"method": SDFT(shown=SHORT), "processing_class": tiny_tokenizer()}
    texts = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in tiny_rows(6)]
    with pytest.raises(DataError, match="task 'stage 1', row 1: has no prompt before its answer: it is a text"):
        trained(tmp_path, rows=texts, **given)
    with pytest.raises(
        ConfigError, match=r"method sdft: needs every row in a sequence of its own, .* turn the trainer"
    ):
        trained(tmp_path, rows=pack(tiny_rows(6), 32), **given)
    with pytest.raises(ConfigError, match="needs processing_class, the tokenizer"):
        trained(tmp_path, rows=tiny_rows(6), method=SDFT())
    with pytest.raises(
        DataError, match=r"row 1: with its answer shown, its prompt has 1.. tokens, which leaves no room"
    ):
        trained(tmp_path, rows=tiny_rows(6), method=SDFT(), processing_class=tiny_tokenizer())
    with pytest.raises(ConfigError, match="sdft puts the model's own answers in the places of all rows"):
        build([("sdft", {}), ("eaft", {})])
    replacing = {"name": "rehearsal", "source": "past", "way": "replace"}
    both = {"name": "sdft", "shown": SHORT, "max_new_tokens": 3}
    with pytest.raises(
        ConfigError, match="method sdft: its rows take the places of all task rows, so that none is left"
    ):
        trained(tmp_path, rows=tiny_rows(6), method=[both, replacing], processing_class=tiny_tokenizer(), stages=2)


def test_a_run_refuses_it_before_there_is_a_model(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text(json.dumps({"text": "some words"}) + "\n")
    (tmp_path / "texts" / "test.jsonl").write_text(json.dumps({"text": "other words"}) + "\n")
    method = {"name": "sdft", "shown": SHORT, "max_new_tokens": 3}
    good = tiny_config(tmp_path, method=method)
    prepare(resolve(load_config(good)))
    cases = [
        (good | {"data": {"packing": True}}, "data.packing: method sdft: needs every row in a sequence of its own"),
        (good | {"data": {"supervise": "all"}}, r"train.json: row 1: has no prompt before its answer: .*supervise"),
        (good | {"method": "sdft"}, r"train.json: row 1: with its answer shown, its prompt has 1.. tokens"),
        (
            good | {"stream": {"tasks": [{"name": "texts", "path": str(tmp_path / "texts")}]}},
            "train.jsonl: row 1: has no prompt before its answer: it is a text",
        ),
    ]
    for config, reason in cases:
        with pytest.raises((ConfigError, DataError), match=reason):
            prepare(resolve(load_config(config)))


@pytest.mark.slow
def test_the_divergence_is_that_of_trl():
    """TRL's SDFTTrainer, with all logits and alpha 1 (reverse) or 0 (forward)."""
    losses = pytest.importorskip("trl.experimental.sdft.loss_utils")
    from holdfast.losses import Divergence, kl_divergence

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 64).double()
    for direction, alpha in (("reverse", 1.0), ("forward", 0.0)):
        theirs = losses.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
        ours, count = kl_divergence(student, teacher, divergence=Divergence(direction=direction))
        assert count == 9 and float(ours) == pytest.approx(float(theirs.sum()), rel=1e-12)
