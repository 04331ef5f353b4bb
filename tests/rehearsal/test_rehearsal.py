"""The engine: every cell of source x loss, its teacher, and what is refused."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from holdfast.api.stage import Rehearsed, Step
from holdfast.errors import ConfigError, DataError
from holdfast.losses import Divergence, kl_divergence, logit_mse
from holdfast.losses.next_token import predicting
from holdfast.methods import build
from holdfast.methods.der import DER, Answer, class_logits
from holdfast.methods.lwf import LwF
from holdfast.methods.rehearsal import Rehearsal
from holdfast.rehearsal.cache import state_cache
from holdfast.rehearsal.samples import rows_fingerprint
from holdfast.system.files import read_json, write_json
from holdfast.training.extra_rows import ExtraRows
from holdfast.training.method_state import load_states, save_states
from support.rehearsed import two_stages
from support.tiny import pad_rows, tiny_model, tiny_rows, tiny_stage, tiny_tokenizer
from support.trained import vector

WORDS = ("red green blue", "the sea moves a weed", "a tide holds fast", "one two three four", "letters and signs")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(WORDS))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row["input_ids"]}) + "\n" for row in tiny_rows(6, seed=5)))
    return str(path)


CELLS = [
    (source, loss)
    for source, loss in product(("past", "general", "self", "current"), ("ce", "kl", "margin", "l1", "l2"))
    if (source, loss) not in {("current", "ce"), ("current", "margin")}
]


@pytest.mark.parametrize(("source", "loss"), CELLS)
def test_every_cell_trains_and_its_term_is_logged(source, loss, tmp_path, texts, corpus):
    options = {"source": source, "loss": loss}
    if source in ("general", "self"):
        options["path"] = texts if source == "general" else corpus
    trainer = two_stages(tmp_path, Rehearsal(**options))
    terms = [log["term/rehearsal"] for log in trainer.state.log_history if "loss" in log]
    assert len(terms) == 3
    if loss != "ce":
        # The model is its own teacher before the first step of the stage.
        assert terms[0] == pytest.approx(0, abs=1e-6)
    assert terms[-1] > 1e-6


PRESETS = [
    *product(("gere", "gere_kl", "gere_l1", "gere_l2"), (1.0, 100.0, "dynamic")),
    *product(("gere_ce", "self_replay", "kl_replay", "lwf"), (1.0, 10.0)),
]


@pytest.mark.parametrize(("name", "weight"), PRESETS)
def test_presets(name, weight, tmp_path, texts, corpus):
    options = {"weight": weight}
    if name != "lwf":
        options["path"] = corpus if "replay" in name else texts
    [method] = build([(name, options)])
    trainer = two_stages(tmp_path, method)
    log = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert log[f"term/{name}"] > 0
    assert (f"term/{name}/ce" in log) == (name.startswith("gere") and name != "gere_ce")
    if weight == "dynamic":
        ce = (log["term/task"] + log[f"term/{name}/ce"]) / 2  # as the published dy
        assert log[f"term/{name}"] == pytest.approx(ce, rel=1e-3)


@pytest.mark.parametrize("method", ["replay", "kl", "margin"])
def test_one_forward_equals_two(method, tmp_path, texts, monkeypatch):
    options = {
        "replay": {"source": "past", "loss": "ce"},
        "kl": {"source": "general", "loss": "kl", "path": texts, "ce_weight": 0.5},
        "margin": {"source": "general", "loss": "margin", "path": texts, "weight": 10},
    }[method]
    results = []
    for together in (False, True):
        monkeypatch.setattr(ExtraRows, "fits_one_pass", lambda self, inputs, extra, x=together: x and bool(extra))
        folder = tmp_path / str(together)
        results.append(vector(two_stages(folder, Rehearsal(**options)).model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=2e-4)


def test_counts_hold_in_every_optimizer_step(tmp_path, texts):
    """GeRe's batch insertion: a fixed number of general rows a step, at any accumulation."""
    asked = []

    class Counted(Rehearsal):
        name = "counted"

        def loss_terms(self, step, batch, outputs):
            asked.append((step.stage.index, step.index, len(step.rehearsed[self.name].samples)))
            return super().loss_terms(step, batch, outputs)

    method = Counted(source="general", path=texts, count=3)
    two_stages(tmp_path, method, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for stage, step in product((1, 2), range(3)):
        assert sum(n for s, k, n in asked if (s, k) == (stage, step)) == 3


@pytest.mark.parametrize("made", [False, True], ids=["logits made again", "the task's logits"])
@pytest.mark.parametrize(("temperature", "squared"), [(1.0, False), (2.0, False), (2.0, True)])
def test_kl_on_current_rows_is_the_plain_formula_with_a_live_copy(temperature, squared, made):
    """LwF's term against a second model that was copied before the stage."""
    model, rows = tiny_model(), tiny_rows(5)
    teacher = tiny_model()
    teacher.load_state_dict(model.state_dict())
    method = LwF(temperature=temperature, temperature_squared=squared)
    stage = tiny_stage(model, rows)
    method.before_stage(stage)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = pad_rows(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    outputs = model(**inputs, output_hidden_states=True)
    step = Step(stage, 0, 5, 1, True)
    mask = predicting(batch["labels"])
    hidden, logits = (outputs.hidden_states[-1],), outputs.logits[mask]
    step.rehearsed = {"lwf": Rehearsed([], batch["labels"], logits, hidden, 1.0, logits if made else None)}
    term = method.loss_terms(step, batch, outputs)["lwf"]
    old = teacher(**inputs).logits
    total, count = kl_divergence(outputs.logits, old, mask, Divergence(temperature, temperature_squared=squared))
    torch.testing.assert_close(term, total / count, rtol=1e-4, atol=1e-6)
    by_hand = F.kl_div(
        F.log_softmax(outputs.logits[mask] / temperature, -1), F.softmax(old[mask] / temperature, -1), reduction="sum"
    )
    torch.testing.assert_close(term, by_hand * (temperature**2 if squared else 1) / mask.sum(), rtol=1e-4, atol=1e-6)
    assert torch.equal(vector(model), vector(model)) and model.training


def test_lwf_is_as_strong_as_its_paper_says():
    assert LwF().options.divergence.factor == 1 and LwF().options.temperature == 2 and LwF().options.weight == 1
    assert Rehearsal(loss="kl", temperature=2.0).options.divergence.factor == 4


@pytest.mark.parametrize("loss", ["kl", "l1", "l2"])
def test_a_cached_teacher_equals_a_live_one(loss, tmp_path):
    """The same rows as past samples (cached) and as the current task's (live) give the same term and gradient."""
    rows = [row | {"row": i} for i, row in enumerate(tiny_rows(6))]
    values = []
    for source in ("past", "current"):
        model = tiny_model()
        method = Rehearsal(source=source, loss=loss)
        stage = tiny_stage(model, rows, index=2)
        stage.folder = tmp_path / source
        if source == "past":
            method.memory.rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
            method.memory.tasks, method.memory.places = [1] * len(rows), list(range(len(rows)))
        method.before_stage(stage)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        batch = pad_rows(rows)
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        step = Step(stage, 0, 6, 1, True)
        hidden = (outputs.hidden_states[-1],)
        step.rehearsed = {"rehearsal": Rehearsed(list(range(6)), batch["labels"], outputs.logits, hidden, 1.0)}
        term = method.loss_terms(step, batch, outputs)["rehearsal"]
        term.backward()
        values.append((term.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert values[0][0] > 0
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)


def by_hand(student, teacher, top):
    """DER's term of two tables of logits [places, vocab], class by class; top None: all tokens are classes."""
    total, classes = 0.0, len(student[0]) if top is None else top + 1
    for h, z in zip(student.tolist(), teacher.tolist(), strict=True):
        order = sorted(range(len(z)), key=lambda token: -z[token])
        own = order if top is None else order[:top]
        total += sum((z[token] - h[token]) ** 2 for token in own)
        if top is not None:
            others = [math.log(sum(math.exp(row[token]) for token in order[top:])) for row in (z, h)]
            total += (others[0] - others[1]) ** 2
    return total / classes / len(student)


@pytest.mark.parametrize("top", [None, 3, 1000])
def test_der_stores_what_the_model_answered(top, tmp_path):
    model, rows = tiny_model(), tiny_rows(8)
    old = tiny_model()
    old.load_state_dict(model.state_dict())
    der = DER(capacity=4, weight=1.0, top=top)
    stage = tiny_stage(model, rows)
    der.after_stage(stage)
    assert len(der.answers) == len(der.memory) == 4
    save_states([der], tmp_path)
    again = DER(capacity=4, weight=1.0, top=top)
    load_states([again], tmp_path, model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    term, student, teacher = der_term(again, model, old)
    expected = by_hand(student, teacher, top if top == 3 else None)
    assert term.item() == pytest.approx(expected, rel=1e-4)
    der.after_stage(tiny_stage(model, tiny_rows(6, seed=3), index=2))
    assert len(der.answers) == 4 and set(der.memory.tasks) <= {1, 2}
    lengths = [sum(label != -100 for label in row["labels"][1:]) for row in der.memory.rows]
    assert [len(answer.logits) for answer in der.answers] == lengths


def der_term(der, model, old):
    """The term of all stored rows, and the logits of their answers of the model and of the old one."""
    batch = pad_rows(der.memory.rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    step = Step(tiny_stage(model, []), 0, 4, 1, True)
    step.rehearsed = {"der": Rehearsed(list(range(len(der.memory))), batch["labels"], logits, (), 1.0)}
    mask = predicting(batch["labels"])
    return der.loss_terms(step, batch, None)["der"], logits[mask], old(**inputs).logits[mask]


def test_der_stores_all_logits_in_the_models_type():
    model = tiny_model().to(torch.bfloat16)
    der = DER(capacity=3, top=None)
    der.after_stage(tiny_stage(model, tiny_rows(4)))
    logits = torch.cat([answer.logits for answer in der.answers])
    assert logits.dtype == torch.bfloat16
    batch = pad_rows(der.memory.rows)
    with torch.no_grad():
        live = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, live[predicting(batch["labels"])], rtol=0.02, atol=0.02)


def test_ders_strength_does_not_depend_on_the_vocabulary():
    """Tokens that no model would choose change neither term nor gradient; as classes of their own they share it."""
    torch.manual_seed(0)
    logits, drift = 4 * torch.randn(5, 40, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    found = {}
    for size in (40, 4000):
        far = torch.full((5, size - 40), -40.0, dtype=torch.float64)
        student = torch.cat([logits + drift, far], dim=1).requires_grad_()
        for top in (10, None):
            stored, tokens = Answer.of(torch.cat([logits, far], dim=1), top)
            term = logit_mse(class_logits(student, tokens), stored) / stored.shape[-1]
            [gradient] = torch.autograd.grad(term, student)
            found[size, top] = torch.cat([term.detach()[None], gradient[:, :40].flatten()])
    torch.testing.assert_close(found[40, 10], found[4000, 10], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[40, None], 100 * found[4000, None])
    assert torch.autograd.gradcheck(lambda h: class_logits(h, tokens[:, :0]), (logits.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda h: class_logits(h, torch.tensor([[3, 7]] * 5)), (logits,))


def test_der_counts_all_other_tokens_as_one():
    """The softmax over the classes is the model's distribution, with the others' probabilities added up."""
    torch.manual_seed(1)
    logits = torch.randn(3, 30, dtype=torch.float64)
    stored, tokens = Answer.of(logits, 4)
    probabilities = logits.softmax(-1)
    strongest = probabilities.sort(dim=-1, descending=True).values
    expected = torch.cat([strongest[:, :4], strongest[:, 4:].sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(stored.softmax(-1), expected)
    torch.testing.assert_close(probabilities.gather(-1, tokens.long()), strongest[:, :4])


def test_der_reads_what_version_0_1_stored():
    """The logits of the whole vocabulary, without numbers of tokens: they become those of classes."""
    model, der = tiny_model(), DER(capacity=3)
    der.after_stage(tiny_stage(model, tiny_rows(4)))
    whole = DER(capacity=3, top=None)
    whole.after_stage(tiny_stage(model, tiny_rows(4)))
    old = whole.state()
    del old["tokens"]
    again = DER(capacity=3)
    again.load_state(old, model)
    for one, two in zip(again.answers, der.answers, strict=True):
        assert torch.equal(one.tokens, two.tokens)
        torch.testing.assert_close(one.logits, two.logits)
    with pytest.raises(ValueError, match="10 a place were stored, and top is 4"):
        DER(capacity=3, top=4).load_state(der.state(), model)


def test_der_trains(tmp_path):
    trainer = two_stages(tmp_path, DER())
    assert [log["term/der"] for log in trainer.state.log_history if "loss" in log][-1] > 0


def test_the_start_teacher_stays_that_of_the_start(tmp_path, texts):
    """In the second stage the cache of the first is read again: the term is not zero at its first step."""
    trainer = two_stages(tmp_path, Rehearsal(source="general", path=texts, loss="l2", teacher="start"))
    first = next(log["term/rehearsal"] for log in trainer.state.log_history if "loss" in log)
    assert first > 1e-6


TEXTS = [f"{a} {b}" for a in ("red", "green", "blue", "dark") for b in ("sea", "weed", "tide", "rock", "sand", "sun")]


def asked_at_the_start(folder, loss="margin"):
    """A method with the start teacher, and what it saves, after it prepared its first stage."""
    (folder / "general.txt").write_text("\n".join(TEXTS))
    method = Rehearsal(source="general", loss=loss, teacher="start", path=str(folder / "general.txt"))
    stage = tiny_stage(tiny_model(), tiny_rows(4))
    stage.folder, stage.tokenizer = folder, tiny_tokenizer()
    method.before_stage(stage)
    return method, stage, method.state()


@pytest.mark.parametrize("loss", ["kl", "margin"])
def test_a_start_teacher_is_not_used_for_texts_that_it_was_not_asked_about(loss, tmp_path):
    """As many texts, as in a run that was killed after its first stage while somebody edited the file."""
    _, stage, state = asked_at_the_start(tmp_path, loss)
    again = Rehearsal(source="general", loss=loss, teacher="start", path=str(tmp_path / "general.txt"))
    again.load_state(state, stage.model)
    stage.index = 2
    (tmp_path / "general.txt").write_text("\n".join(text.replace("sea", "sun") for text in TEXTS))
    with pytest.raises(DataError, match=r"general\.txt: its samples are not those .*put the old file back"):
        again.before_stage(stage)
    (tmp_path / "general.txt").write_text("\n".join(TEXTS))
    again.rows = []
    again.before_stage(stage)
    assert again.teacher is not None


def test_thresholds_are_those_of_the_rehearsed_texts_without_the_held_out(tmp_path):
    method, stage, _ = asked_at_the_start(tmp_path)
    assert method.size == 22 and len(method.held_out) == 2
    hidden = torch.cat(stage.hidden_states(method.rows[: method.size])).double()
    mean, std = hidden.mean(0), hidden.std(0, correction=0)
    torch.testing.assert_close(method.teacher.low.double(), mean - std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.teacher.high.double(), mean + std, rtol=1e-5, atol=1e-6)


def test_a_run_of_version_0_1_keeps_its_thresholds(tmp_path):
    """Its cache is of all texts, the held-out ones among them, and its manifest names them in the key alone."""
    method, stage, state = asked_at_the_start(tmp_path)
    key = state["start"] | {"samples": rows_fingerprint(method.rows)}
    folder = tmp_path / "rehearsal"
    _, low, _ = state_cache(folder, key, method.rows, stage.hidden_states)
    manifest = read_json(folder / "manifest.json")
    del manifest["rows"]
    write_json(folder / "manifest.json", manifest)
    again = Rehearsal(source="general", loss="margin", teacher="start", path=str(tmp_path / "general.txt"))
    again.load_state(state | {"start": key}, stage.model)
    again.before_stage(stage)
    assert torch.equal(again.teacher.low, low) and not torch.equal(low, method.teacher.low)


REFUSED = {
    "its own next-token loss": ({"source": "current"}, "already"),
    "thresholds of a moving set": ({"source": "current", "loss": "margin"}, "fixed set"),
    "replace with kl": ({"way": "replace", "loss": "kl"}, "must be ce"),
    "replace all": ({"way": "replace", "ratio": 1.0}, "below 1"),
    "no texts": ({"source": "general"}, "give path"),
    "two sources of texts": ({"source": "general", "path": "x", "dataset": "y"}, "give path"),
    "thresholds of drawn samples": ({"source": "self", "loss": "margin"}, "fixed set of samples; write one"),
    "drawn from the start": ({"source": "self", "loss": "kl", "teacher": "start"}, "use teacher previous, or a path"),
    "a domain of a corpus": ({"source": "self", "path": "x", "domain": "eng"}, "without a path draws samples"),
    "a chat of a domain": ({"source": "self", "chat": True, "domain": "eng"}, "takes no domain"),
    "past at the start": ({"loss": "kl", "teacher": "start"}, "not known before the first stage"),
    "two counts": ({"count": 2, "ratio": 0.5}, "not both"),
    "dynamic ce": ({"weight": "dynamic"}, "ce itself"),
    "negative weight": ({"weight": -1}, "must not be below 0"),
    "temperature of zero": ({"loss": "kl", "temperature": 0}, "temperature: must be greater than 0"),
    "temperature without kl": ({"loss": "l1", "temperature": 2.0}, "temperature: would change nothing"),
    "memory without past": ({"source": "general", "path": "x", "capacity": 5}, "capacity: would change nothing"),
    "no domain among several": ({"source": "self", "domain": []}, "domain: names none; leave it out"),
    "unknown loss": ({"loss": "kll"}, "loss: must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(case):
    options, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason):
        Rehearsal(**options)


def test_general_samples_fit_into_the_context(tmp_path):
    (tmp_path / "long.txt").write_text("a long text " * 40)
    method = Rehearsal(source="general", path=str(tmp_path / "long.txt"))
    model = tiny_model(max_position_embeddings=50)
    stage = tiny_stage(model, tiny_rows(4))
    stage.tokenizer = tiny_tokenizer()
    method.before_stage(stage)
    assert [len(row["input_ids"]) for row in method.rows] == [50]
