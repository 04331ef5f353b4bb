"""Chat templates and the conversations of today: reasoning, tools, system turns anywhere, generation marks."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from holdfast.api.task import Example
from holdfast.data.conversation import conversation, tools_of
from holdfast.data.encode import Encoder
from holdfast.errors import DataError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|final|>"]
HEAD, ASK = "<|im_start|>{{ m['role'] }}\n", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

THINKING = (  # earlier reasoning is removed, tools and their calls are shown, as Qwen's templates do
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}" + HEAD + "{% if m['role'] == 'assistant' and loop.last and m['reasoning_content'] %}"
    "<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>\n{{ c['function'] | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}" + ASK
)
NO_REASONING = "{% for m in messages %}" + HEAD + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASK
CHANNELS = (  # a word stands before every answer, as gpt-oss's templates have it
    "{% for m in messages %}" + HEAD + "{% if m['role'] == 'assistant' %}{% if m['thinking'] %}analysis "
    "{{ m['thinking'] }}<|im_end|>{% endif %}<|final|>final {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASK
)
ALTERNATING = (  # one system turn, in front; then questions and answers in turn
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% if rest != messages %}[{{ messages[0]['content'] }}]{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    + HEAD
    + "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    + ASK
)
MARKED = (
    "{% for m in messages %}" + HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}" + ASK
)
PARTS = "{% for m in messages %}" + HEAD + "{{ m['content'][0]['text'] }}<|im_end|>\n{% endfor %}" + ASK


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["hold fast"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, bos_token="<s>", eos_token="</s>")


def said(*turns: tuple[str, str] | dict[str, Any], tools: Any = None) -> Example:
    messages = [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]
    return Example("f", 0, conversation(messages, "messages"), tools=tools_of({"tools": tools}))


def supervised(encoder: Encoder, example: Example) -> list[str]:
    found = []
    for row in encoder.encode(example):
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        found.append(encoder.tokenizer.decode([token for token, label in pairs if label != -100]))
    return found


def shown(encoder: Encoder, example: Example) -> str:
    return encoder.tokenizer.decode(encoder.encode(example)[-1]["input_ids"])


REASONED = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


def test_reasoning_is_supervised_where_the_template_shows_it_and_left_out_of_the_response() -> None:
    encoder = Encoder(tokenizer(THINKING), max_length=500)
    again = {"role": "assistant", "content": "9", "reasoning_content": "3 times 3"}
    example = said(("user", "2+2?"), REASONED, ("user", "3*3?"), again)
    assert supervised(encoder, example) == [
        "<think>\n2 and 2\n</think>\n\n4<|im_end|>\n",
        "<think>\n3 times 3\n</think>\n\n9<|im_end|>\n",
    ]
    prompt = encoder.prompt(example, reserve=0)
    response = encoder.encode(example)[-1]["input_ids"][len(prompt) :]
    assert encoder.decode(response) == example.answer == "9"
    assert "2 and 2" not in encoder.tokenizer.decode(prompt)


def test_reasoning_that_is_not_shown_is_refused() -> None:
    for template, reason in ((NO_REASONING, "does not show the reasoning"), (None, "reasoning is written by a chat")):
        with pytest.raises(DataError, match=f"{reason}.*data.reasoning=drop"):
            Encoder(tokenizer(template), max_length=500).encode(said(("user", "2+2?"), REASONED))


def test_a_word_before_every_answer_is_no_part_of_the_response() -> None:
    encoder = Encoder(tokenizer(CHANNELS), max_length=500)
    for example in (said(("user", "2+2?"), ("assistant", "4")), said(("user", "2+2?"), REASONED)):
        [text] = supervised(encoder, example)
        assert text.endswith("<|final|>final 4<|im_end|>\n")
        assert encoder.decode(encoder.tokenizer(text)["input_ids"]) == "4"


CALL = {"name": "weather", "arguments": {"place": "Kiel"}}
TOOLS = [{"name": "weather", "parameters": {"type": "object"}}]
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_tools_are_shown_and_their_calls_supervised() -> None:
    encoder = Encoder(tokenizer(THINKING), max_length=900)
    told = {"role": "tool", "name": "weather", "content": '{"celsius": 3}'}
    example = said(("user", "Warm?"), CALLS, told, ("assistant", "3 degrees"), tools=TOOLS)
    call = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call><|im_end|>\n"
    assert supervised(encoder, example) == [call + "3 degrees<|im_end|>\n"]
    assert '"type": "function", "function": {"name": "weather"' in shown(encoder, example)
    assert '{"celsius": 3}' in shown(encoder, example)
    assert said(("user", "Warm?"), CALLS, tools=TOOLS).answer == json.dumps(CALL)


def test_tools_that_are_not_shown_are_refused() -> None:
    asked = ("user", "Warm?")
    for example, reason in (
        (said(asked, ("assistant", "No"), tools=TOOLS), "does not show the tools"),
        (said(("user", "What says the weather?"), ("assistant", "No"), tools=TOOLS), "does not show the tools"),
        (said(asked, CALLS), "does not show the call"),
    ):
        with pytest.raises(DataError, match=reason):
            Encoder(tokenizer(NO_REASONING), max_length=500).encode(example)
        with pytest.raises(DataError, match="written by a chat template, and there is none"):
            Encoder(tokenizer(None), max_length=500).encode(example)


def test_a_system_turn_stands_where_it_was_said(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(tokenizer(ALTERNATING), max_length=500)
    front = ("system", "Be kind."), ("system", "Be brief.")
    assert shown(encoder, said(*front, ("user", "a"), ("assistant", "b"))).startswith("[Be kind.\nBe brief.]")
    with caplog.at_level(logging.WARNING, "holdfast"):
        text = shown(encoder, said(("user", "a"), ("assistant", "b"), front[0], ("user", "c"), ("assistant", "d")))
    assert "user\na<|im_end|>" in text and "user\nBe kind.\n\nc<|im_end|>" in text
    assert "no place for a system turn" in caplog.text
    text = shown(
        encoder, said(front[1], ("user", "a"), ("assistant", "b"), front[0], ("user", "c"), ("assistant", "d"))
    )
    assert text.startswith("[Be brief.]") and "user\nBe kind.\n\nc<|im_end|>" in text


def test_what_a_template_marks_is_supervised() -> None:
    example = said(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    encoder = Encoder(tokenizer(MARKED), max_length=500)
    assert supervised(encoder, example) == ["b<|im_end|>d<|im_end|>"]
    unmarked = Encoder(tokenizer(NO_REASONING), max_length=500)
    assert encoder.encode(example)[0]["input_ids"] == unmarked.encode(example)[0]["input_ids"]
    assert encoder.stop_ids == sorted(encoder.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))


@pytest.mark.parametrize("template", [NO_REASONING, None])
@pytest.mark.parametrize("supervise", ["answer", "all"])
def test_answers_that_are_not_trained_are_not_supervised(template: str | None, supervise: Any) -> None:
    bad = {"role": "assistant", "content": "BAD", "weight": 0}
    example = said(("user", "a"), bad, ("user", "c"), ("assistant", "good"))
    [text] = supervised(Encoder(tokenizer(template), max_length=500, supervise=supervise), example)
    assert "BAD" not in text and "good" in text and ("c" in text.replace("<|", "")) == (supervise == "all")


def test_content_as_parts_for_templates_that_read_parts() -> None:
    encoder = Encoder(tokenizer(PARTS), max_length=500)
    assert supervised(encoder, said(("user", "a"), ("assistant", "b"))) == ["b<|im_end|>\n"]


def test_special_tokens_in_plain_text_stay_text(caplog: pytest.LogCaptureFixture) -> None:
    example = said(("user", "What ends a text?"), ("assistant", "the token </s> does"))
    with caplog.at_level(logging.WARNING, "holdfast"):
        Encoder(tokenizer(NO_REASONING), max_length=500).encode_all([example, example])
    assert caplog.text.count("'</s>' in a text becomes a control token") == 1
    encoder = Encoder(tokenizer(None), max_length=500)
    ids = encoder.encode(example)[0]["input_ids"]
    assert ids.count(encoder.tokenizer.eos_token_id) == 1 and ids[-1] == encoder.tokenizer.eos_token_id
    assert encoder.decode(ids[len(encoder.prompt(example, reserve=0)) :]) == example.answer
