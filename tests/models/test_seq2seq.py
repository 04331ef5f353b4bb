"""Sequence-to-sequence models behave as transformers' own do, and to all that holdfast builds on as causal ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from holdfast.api.rows import model_inputs, prompt
from holdfast.api.task import Example, Turn
from holdfast.data.collate import Collator, concat
from holdfast.data.encode_apart import ApartEncoder, encoder_of
from holdfast.losses.next_token import next_token_nll
from holdfast.models.generation import generate
from holdfast.models.head import head
from holdfast.models.likelihood import token_losses
from holdfast.models.sampling import sample
from holdfast.models.seq2seq import (
    answered_row,
    callable_as_causal,
    encoder_inputs,
    native_rows,
    next_token_loss,
    start_of,
)
from holdfast.rehearsal.pseudo import Writing, _sample
from support.seq2seq import TOKENIZERS, seq2seq_model

NAMES = ("t5", "bart")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
names = pytest.mark.parametrize("name", NAMES)
PAIRS = [("red: ab?", "r"), ("green: a longer one, xyz?", "green g"), ("the", "12 and 7"), ("a?", "d"), ("ab cd?", "b")]


def asked(question: str, answer: str, row: int = 0) -> Example:
    turns = (Turn("user", question, cut=(0, len(question))), Turn("assistant", answer))
    return Example("rows.json", row, turns)


def encoder(name: str, **options: Any) -> ApartEncoder:
    made = encoder_of(seq2seq_model(name).config, TOKENIZERS[name](), **{"max_length": 64} | options)
    assert isinstance(made, ApartEncoder)
    return made


def rows_of(name: str) -> list[dict[str, Any]]:
    return encoder(name).encode_all([asked(*pair, row) for row, pair in enumerate(PAIRS)])


def native_batch(name: str) -> dict[str, torch.Tensor]:
    """The same pairs as a user of plain transformers makes a batch of them."""
    tokenizer = TOKENIZERS[name]()
    batch = tokenizer([question for question, _ in PAIRS], padding=True, return_tensors="pt")
    labels = [tokenizer(text_target=answer)["input_ids"] for _, answer in PAIRS]
    longest = max(map(len, labels))
    batch["labels"] = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in labels])
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


@names
def test_loss_and_gradient_are_those_of_plain_transformers(name):
    found, plain = seq2seq_model(name), seq2seq_model(name)
    batch = Collator(0)(rows_of(name))
    batch.pop("row")
    labels = batch.pop("labels")
    outputs = callable_as_causal(found)(**batch, use_cache=False)
    loss = next_token_loss(outputs, labels)
    loss.backward()
    expected = plain(**native_batch(name))
    expected.loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(outputs.logits[:, :-1], expected.logits, atol=1e-5, rtol=1e-5)
    for (key, one), two in zip(found.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4, msg=key)


@names
def test_labels_in_the_call_give_the_same_loss(name):
    model, batch = callable_as_causal(seq2seq_model(name)), Collator(0)(rows_of(name))
    batch.pop("row")
    loss = model(**batch).loss
    assert float(loss) == pytest.approx(float(seq2seq_model(name)(**native_batch(name)).loss), rel=1e-6)


@names
@torch.no_grad()
def test_hidden_states_and_head_give_the_models_own_logits(name):
    model = callable_as_causal(seq2seq_model(name))
    batch = model_inputs(Collator(0)(rows_of(name)))
    outputs = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(head(model).logits(outputs.hidden_states[-1]), outputs.logits, atol=1e-5, rtol=1e-5)


def test_the_head_of_an_untied_t5_is_not_scaled():
    model = callable_as_causal(seq2seq_model("t5", tie_word_embeddings=False))
    assert head(model).logit_scale == 1 and head(callable_as_causal(seq2seq_model("t5"))).logit_scale == 0.25


@names
def test_greedy_answers_are_those_of_model_generate(name):
    model, tokenizer = seq2seq_model(name), TOKENIZERS[name]()
    own = encoder(name)
    prompts = [own.prompt(asked(*pair), reserve=9) for pair in PAIRS]
    found = generate(model, prompts, max_new_tokens=6, batch_size=3, eos_token_ids=own.stop_ids, pad_token_id=0)
    for (question, _), answer in zip(PAIRS, found, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1)[0, 1:].tolist()
        ends = [place for place, token in enumerate(expected) if token in own.stop_ids]
        assert answer == expected[: ends[0] if ends else None]
    assert len({tuple(answer) for answer in found}) > 1, "the prompts must matter"


@names
@torch.no_grad()
def test_likelihoods_are_those_of_single_rows(name):
    model, rows = callable_as_causal(seq2seq_model(name)), rows_of(name)
    rows += [rows[0] | {"input_ids": [*rows[0]["input_ids"][:-1], 9], "labels": [*rows[0]["labels"][:-1], 9]}]
    rows += [rows[1] | {"encoder_ids": rows[2]["encoder_ids"]}]  # the same answer to another prompt
    nats, counts = token_losses(model, rows, batch_size=3, pad_token_id=0)
    for row, found, count in zip(rows, nats, counts, strict=True):
        labels = torch.tensor([row["labels"][1:]])
        plain = seq2seq_model(name)(input_ids=torch.tensor([row["encoder_ids"]]), labels=labels)
        assert count == labels.shape[1]
        assert found == pytest.approx(float(plain.loss) * count, rel=1e-5)
    assert nats[1] != pytest.approx(nats[-1], rel=1e-3)


@names
def test_samples_have_the_likelihood_that_they_were_drawn_with(name):
    model, rows = callable_as_causal(seq2seq_model(name)), rows_of(name)
    prompts = [row["encoder_ids"] for row in rows]
    drawn = sample(model, prompts, max_new_tokens=5, seed=0, stop_token_ids=encoder(name).stop_ids, hidden=True)
    again = sample(model, prompts[1:2], max_new_tokens=5, seed=0, numbers=[1], stop_token_ids=encoder(name).stop_ids)
    assert again.tokens == drawn.tokens[1:2]
    own = [answered_row(p, tokens, start_of(model)) for p, tokens in zip(prompts, drawn.tokens, strict=True)]
    nats, _ = token_losses(model, own, batch_size=2, pad_token_id=0)
    assert nats.tolist() == pytest.approx([-log_prob for log_prob in drawn.log_probs], rel=1e-4, abs=1e-5)
    with torch.no_grad():
        for row, hidden in zip(own, drawn.hidden, strict=True):
            batch = model_inputs(Collator(0)([row]))
            expected = model(**batch, output_hidden_states=True).hidden_states[-1][0, :-1]
            torch.testing.assert_close(hidden, expected, atol=1e-3, rtol=1e-3)


# --- rows ---


@names
def test_rows_are_what_the_tokenizer_makes_of_input_and_target(name):
    tokenizer = TOKENIZERS[name]()
    for row, (question, answer) in zip(rows_of(name), PAIRS, strict=True):
        assert row["encoder_ids"] == prompt(row) == tokenizer(question)["input_ids"]
        target = tokenizer(text_target=answer)["input_ids"]
        start = seq2seq_model(name).config.decoder_start_token_id
        assert row["input_ids"] == [start, *target] and row["labels"] == [-100, *target]
        assert encoder(name).decode(row["input_ids"]) == answer


@names
def test_the_prompt_is_cut_and_never_the_answer(name):
    own = encoder(name, max_length=12)
    [row] = own.encode(asked("a long prompt that does not fit anywhere", "12"))
    [whole] = encoder(name).encode(asked("a long prompt that does not fit anywhere", "12"))
    assert len(row["encoder_ids"]) == 12 and row["labels"] == whole["labels"] and own.truncated == 1
    assert row["encoder_ids"][:4] == whole["encoder_ids"][:4] and row["encoder_ids"][-3:] == whole["encoder_ids"][-3:]
    with pytest.raises(Exception, match=r"rows.json: row 1: its answer has \d+ tokens, more than the 11 of data.max_l"):
        own.encode(asked("a?", "an answer that is far too long"))
    cutting = encoder(name, max_length=12, long_answers="cut")
    [row] = cutting.encode(asked("a?", "an answer that is far too long"))
    assert len(row["input_ids"]) == 12 and cutting.cut_answers == 1
    assert row["labels"][-1] not in cutting.stop_ids


@names
def test_each_answer_of_a_conversation_is_a_row(name):
    turns = ("user", "red?"), ("assistant", "no"), ("user", "the sea?"), ("assistant", "yes")
    example = Example("rows.json", 0, tuple(Turn(role, text) for role, text in turns))
    own, tokenizer = encoder(name), TOKENIZERS[name]()
    first, second = own.encode(example)
    assert tokenizer.decode(first["encoder_ids"], skip_special_tokens=True).strip() == "red?"
    said = tokenizer.decode(second["encoder_ids"], skip_special_tokens=True)
    assert said.split() == ["red?", "no", "the", "sea?"]
    assert second["encoder_ids"] == own.prompt(example, 5)
    ends = [token for token in second["encoder_ids"] if token in own.stop_ids]
    assert ends == second["encoder_ids"][-1:], "what was said before has no end of its own"


@names
def test_what_a_model_with_an_encoder_cannot_do_is_refused(name):
    with pytest.raises(Exception, match=r"data.supervise: is all, but a sequence-to-sequence model predicts no token"):
        encoder(name, supervise="all")
    with pytest.raises(Exception, match=r"data.template: is chat, but a sequence-to-sequence"):
        encoder(name, template="chat")


def test_texts_are_answers_to_an_empty_prompt_in_windows():
    own, tokenizer = encoder("t5", max_length=6), TOKENIZERS["t5"]()
    ids = tokenizer("the red one is green")["input_ids"]
    rows = own.encode(Example("texts.txt", 0, text="the red one is green"))
    assert rows[0]["encoder_ids"] == [1] and [row["input_ids"][0] for row in rows] == [0] * len(rows)
    assert [token for row in rows for token in row["labels"][1:]] == ids
    assert [row["encoder_ids"] for row in rows[1:]] == [row["input_ids"][-1:] for row in rows[:-1]]
    assert own.of_text({"input_ids": [5, 6], "labels": [5, 6]}) == {
        "encoder_ids": [1], "input_ids": [0, 5, 6], "labels": [-100, 5, 6]
    }  # fmt: skip


@names
def test_batches_are_padded_and_joined(name):
    rows, pad = rows_of(name), Collator(0)
    joint, whole = concat(pad(rows[:2]), pad(rows[2:]), 0), pad(rows)
    assert joint.keys() == whole.keys() >= {"encoder_ids", "encoder_mask"}
    assert all(torch.equal(joint[key], whole[key]) for key in whole)


@names
def test_batches_of_transformers_collators_become_rows(name):
    native = native_batch(name)
    batch = native_rows(native, seq2seq_model(name).config.decoder_start_token_id, 0)
    expected = Collator(0)(rows_of(name))
    assert all(torch.equal(batch[key], expected[key]) for key in batch)
    logits = callable_as_causal(seq2seq_model(name))(**model_inputs(batch)).logits
    nll, tokens = next_token_nll(logits, batch["labels"])
    plain = F.cross_entropy(
        seq2seq_model(name)(**native).logits.flatten(0, 1), native["labels"].flatten(), reduction="sum"
    )
    assert int(tokens) == int((native["labels"] != -100).sum()) and float(nll) == pytest.approx(float(plain), rel=1e-5)


# --- general abilities ---


@names
def test_choices_and_texts_are_measured_as_lm_evaluation_harness_does(name):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not installed")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    model, own = seq2seq_model(name), encoder(name)
    harness = huggingface.HFLM(
        pretrained=seq2seq_model(name), tokenizer=TOKENIZERS[name](), batch_size=2, max_length=64
    )
    questions = [("is the red one? ", "green"), ("red:", "12"), ("the", "red one")]
    rows = [own.choice(asked(question, choice), end=False) for question, choice in questions]
    pairs = [(question, f" {choice}") for question, choice in questions]
    found, _ = token_losses(callable_as_causal(model), rows, batch_size=2, pad_token_id=0)
    requests = [instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    expected = [-total for total, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    texts = ["the red one is green", "red"]
    rows = [row for text in texts for row in own.encode(Example("texts.txt", 0, text=text))]
    found, _ = token_losses(model, rows, batch_size=2, pad_token_id=0)
    requests = [instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    expected = [-total for total in harness.loglikelihood_rolling(requests, disable_tqdm=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@names
def test_pseudo_samples_are_what_the_decoder_writes_after_a_tasks_mark(name):
    model, tokenizer = callable_as_causal(seq2seq_model(name)), TOKENIZERS[name]()
    writing = Writing.of(tokenizer, "red", start_of(model))
    [text] = _sample(model, writing, 1, 9, 1, torch.Generator())
    inputs = encoder_inputs([writing.start], 0)
    found = seq2seq_model(name).generate(
        inputs["encoder_ids"],
        generation_config=GenerationConfig(**GREEDY | {"decoder_start_token_id": start_of(model)}),
    )
    assert text == found[0, 1:].tolist()
    row = rows_of(name)[1]
    written = writing.write(row)
    assert written["encoder_ids"] == writing.start and written["input_ids"][0] == start_of(model)
    assert writing.read(written["input_ids"][1:]) == {key: row[key] for key in ("input_ids", "labels", "encoder_ids")}
