"""Examples to tokens: what is trained is what is generated from, answers survive, and only the input is cut."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from holdfast.api.task import Example, Turn
from holdfast.config.model import ModelConfig
from holdfast.config.stream import DataConfig, StreamConfig
from holdfast.data.encode import Encoder, resolve_max_length
from holdfast.data.load import load_stream
from holdfast.errors import ConfigError, DataError
from holdfast.models.pretrained import load_tokenizer
from support.paths import SHARED, needs_shared

WORDS = "what is the name of this town in the year and who was its mayor then river good bad".split()  # noqa: SIM905
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]

# Templates of the kinds that are in use; each writes a turn's content in its own way.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # trims what is said, begins with the begin token
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (  # no special token but begin and end; a space before the answer
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[ASK] {{ m['content'] }} [/ASK]{% endif %}{% endfor %}"
)
THINKING = (  # an empty thought before the last answer only; asked not to think, it opens and closes one itself
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "no_system": NO_SYSTEM, "brackets": BRACKETS, "thinking": THINKING}


def corpus() -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=8)).capitalize() + "?\n" for _ in range(200)]


def byte_level(template: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """Like GPT-2's, Qwen's and Llama 3's: bytes, no space in front."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **names)


def sentence_piece(template: str | None = None) -> PreTrainedTokenizerFast:
    """Like Llama 2's and Mistral's: a space before every text, unknown characters as bytes, begin token by default."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        [text.strip() for text in corpus()],
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False),
    )
    values = json.loads(made.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if not token["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(values))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


KINDS = {"bytes": byte_level, "pieces": sentence_piece}


def example(*said: tuple[str, str], row: int = 0) -> Example:
    turns = [Turn(role, text, (0, len(text)) if role == "user" else None) for role, text in said]  # type: ignore[arg-type]
    return Example("f.json", row, tuple(turns))


def asked(prompt: str, answer: str, cut: str | None = None) -> Example:
    """A prompt of which ``cut`` may be cut."""
    span = None if cut is None else (prompt.index(cut), prompt.index(cut) + len(cut))
    return Example("f.json", 0, (Turn("user", prompt, span), Turn("assistant", answer)))


def supervised(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


CONVERSATIONS = [
    example(("user", "What is the name of this town?"), ("assistant", "the good river")),
    example(("user", "Name?\nAnswer:"), ("assistant", "1,234.5 °C — été")),
    example(("user", "ends in a blank: "), ("assistant", "x")),
    example(("user", "ends in a line\n"), ("assistant", "two  blanks inside\n\nand lines")),
    example(("user", "code"), ("assistant", ") ; } else {\n\tx = 1")),
    example(("user", "判断"), ("assistant", "中立")),
    example(("system", "Be good."), ("user", "Who?"), ("assistant", "the mayor")),
    example(
        ("user", "Who?"),
        ("assistant", "the mayor"),
        ("user", "Of the town?"),
        ("assistant", "of the river"),
        ("user", "Then?"),
        ("assistant", "bad"),
    ),
]
CASES = list(itertools.product(KINDS, [None, *TEMPLATES]))


@pytest.fixture(scope="module")
def tokenizers() -> dict[tuple[str, str | None], PreTrainedTokenizerFast]:
    return {(kind, name): KINDS[kind](TEMPLATES.get(name or "")) for kind, name in CASES}


# --- the guarantee ---


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda e: repr(e.answer)[:12])
def test_what_is_trained_is_what_is_generated_from(tokenizers: Any, case: Any, conversation: Example) -> None:
    encoder = Encoder(tokenizers[case], max_length=2000)
    assert encoder.chat == (case[1] is not None)
    rows = encoder.encode(conversation)
    last, length, prompt = rows[-1], encoder.answer_length(conversation), encoder.prompt(conversation, reserve=0)
    assert last["input_ids"] == prompt + last["input_ids"][-length:]
    assert last["labels"][-length:] == last["input_ids"][-length:]
    assert last["labels"][len(prompt) - 1] == -100
    assert encoder.decode(last["input_ids"][-length:]) == conversation.answer
    assert last["input_ids"][-length:][-1] in encoder.stop_ids or case[1] is not None
    assert any(token in encoder.stop_ids for token in last["input_ids"][-length:])
    assert all(row["row"] == conversation.row for row in rows)
    assert all(
        label in (-100, token) for row in rows for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    answers = [turn.content for turn in conversation.turns if turn.role == "assistant"]
    said = encoder.tokenizer.decode([t for row in rows for t in supervised(row)], skip_special_tokens=True)
    assert "".join(said.split()) == "".join("".join(answers).split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml", "headers", "no_system"])
def test_a_chat_is_tokenised_as_the_template_writes_it(tokenizers: Any, kind: str, name: str) -> None:
    """Every answer stands after special tokens and a newline, so that the whole text gives the same tokens."""
    tokenizer = tokenizers[kind, name]
    for conversation in CONVERSATIONS:
        if name == "no_system" and conversation.turns[0].role == "system":
            continue
        said = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        text = tokenizer.apply_chat_template(said, tokenize=False)
        [row] = Encoder(tokenizer, max_length=2000).encode(conversation)
        assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        if kind == "bytes":
            assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_template_is_the_text_a_person_would_write(tokenizers: Any, kind: str) -> None:
    tokenizer = tokenizers[kind, None]
    encoder = Encoder(tokenizer, max_length=2000)
    begin = [tokenizer.bos_token_id] if kind == "pieces" else []
    for prompt, answer, text in [
        ("Who is it?", "the mayor", "Who is it? the mayor"),
        ("Who is it?\n", "the mayor", "Who is it?\nthe mayor"),
        ("Who is it: ", "the mayor", "Who is it: the mayor"),
    ]:
        [row] = encoder.encode(asked(prompt, answer))
        assert row["input_ids"][: len(begin)] == begin
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        inner = row["input_ids"][len(begin) : -1]
        assert tokenizer.decode(inner) == text
        if not prompt.endswith(" "):
            assert inner == tokenizer(text, add_special_tokens=False)["input_ids"]
    turns = example(("system", "Be good."), ("user", "A?"), ("assistant", "b"), ("user", "C?"), ("assistant", "d"))
    [row] = encoder.encode(turns)
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == "Be good.\nA? b\nC? d"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2


def test_many_examples_give_what_each_gives_alone(tokenizers: Any) -> None:
    for case in CASES:
        encoder = Encoder(tokenizers[case], max_length=2000)
        alone = [row for conversation in CONVERSATIONS for row in encoder.encode(conversation)]
        assert encoder.encode_all(CONVERSATIONS) == alone
    assert encoder.encode_all([]) == []


# --- supervision ---


def test_supervise_all_counts_every_token_but_the_begin(tokenizers: Any) -> None:
    for kind, begins in (("bytes", False), ("pieces", True)):
        [row] = Encoder(tokenizers[kind, None], max_length=2000, supervise="all").encode(CONVERSATIONS[0])
        assert row["labels"] == ([-100] if begins else row["input_ids"][:1]) + row["input_ids"][1:]
    [row] = Encoder(tokenizers["bytes", "headers"], max_length=2000, supervise="all").encode(CONVERSATIONS[0])
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_a_row_without_anything_to_predict_is_refused() -> None:
    encoder = Encoder(byte_level(), max_length=100)
    with pytest.raises(DataError, match=r"f\.json: row 5: nothing left to supervise"):
        encoder.encode(Example("f.json", 4, text="x"))


# --- plain text ---


@pytest.mark.parametrize("kind", KINDS)
def test_windows_predict_every_token_of_a_text_once(tokenizers: Any, kind: str) -> None:
    tokenizer = tokenizers[kind, None]
    text = "".join(corpus()[:6])
    whole = tokenizer(text)["input_ids"]
    for max_length in (8, 13, len(whole) - 1, len(whole), len(whole) + 1):
        rows = Encoder(tokenizer, max_length=max_length).encode(Example("f", 7, text=text))
        assert all(len(row["input_ids"]) <= max_length for row in rows)
        assert [token for row in rows for token in row["labels"][1:]] == whole[1:]
        for before, after in itertools.pairwise(rows):
            assert after["input_ids"][0] == before["input_ids"][-1]
            assert after["labels"][0] == -100
        assert {row["row"] for row in rows} == {7}
        assert len(rows) == -(-(len(whole) - 1) // (max_length - 1))


# --- truncation ---


def inner(encoder: Encoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_middle_of_the_input_goes_first_and_nothing_else(tokenizers: Any, case: Any) -> None:
    tokenizer = tokenizers[case]
    words = [f"w{i}" for i in range(60)]
    sentence = " ".join(words)
    row = asked(f"Say what it is.\nOption: good, bad\n{sentence}\nAnswer:", "good", cut=sentence)
    whole = Encoder(tokenizer, max_length=5000)
    [full] = whole.encode(row)
    need = len(full["input_ids"])
    for max_length in (need, need - 1, need - 7, need // 2):
        encoder = Encoder(tokenizer, max_length=max_length)
        [short] = encoder.encode(row)
        assert len(short["input_ids"]) == max_length
        assert supervised(short) == supervised(full)
        assert encoder.truncated == (max_length < need)
        kept = inner(encoder, short["input_ids"])
        assert "Say what it is.\nOption: good, bad\nw0 " in kept
        assert "w59\nAnswer:" in kept
        length = encoder.answer_length(row)
        assert encoder.prompt(row, reserve=length) == short["input_ids"][:-length]
        ids, gone = full["input_ids"], need - max_length
        start = next(i for i in range(max_length + 1) if ids[:i] + ids[i + gone :] == short["input_ids"])
        if gone:
            first = next(i for i in range(need) if "w0" in inner(encoder, ids[: i + 1]))
            after = next(i for i in range(need) if "w59" in inner(encoder, ids[: i + 1]))
            assert abs((start - first) - (after - (start + gone))) <= 6  # as much is left before it as after it
    assert encoder.truncated == 1
    encoder.encode(row)
    assert encoder.truncated == 1


def test_prompts_leave_room_for_the_response(tokenizers: Any) -> None:
    sentence = " ".join(WORDS * 10)
    row = asked(f"Who?\n{sentence}\nAnswer:", "good", cut=sentence)
    for case in CASES:
        encoder = Encoder(tokenizers[case], max_length=120)
        assert [len(encoder.prompt(row, reserve=reserve)) for reserve in (0, 1, 40)] == [120, 119, 80]
        assert encoder.truncated == 1


def test_what_does_not_fit_is_refused_with_its_lengths(tokenizers: Any) -> None:
    sentence = " ".join(WORDS)
    for case in CASES:
        row = Example("data/f.json", 8, asked(f"Who?\n{sentence}\nAnswer:", "good bad " * 10, cut=sentence).turns)
        length = len(Encoder(tokenizers[case], max_length=5000).encode(row)[0]["input_ids"])
        encoder = Encoder(tokenizers[case], max_length=20)
        with pytest.raises(DataError) as error:
            encoder.encode(row)
        for part in ("data/f.json: row 9: ", f"has {length} tokens", "data.max_length=20"):
            assert part in str(error.value)
        with pytest.raises(DataError, match=r"less 15 for the response \(evaluation\.max_new_tokens\)"):
            encoder.prompt(row, reserve=15)
        assert encoder.truncated == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_answer_that_is_too_long_may_lose_its_end(tokenizers: Any, case: Any) -> None:
    sentence = " ".join(WORDS * 4)
    row = asked(f"Who?\n{sentence}\nAnswer:", "good bad " * 320, cut=sentence)
    [full] = Encoder(tokenizers[case], max_length=5000).encode(row)
    answer = supervised(full)
    encoder = Encoder(tokenizers[case], max_length=160, long_answers="cut")
    [short] = encoder.encode(row)
    assert len(short["input_ids"]) == 160
    assert supervised(short) == answer[: len(supervised(short))]  # its beginning, and no end token
    assert 80 <= len(supervised(short)) < len(answer)
    assert (encoder.truncated, encoder.cut_answers) == (1, 1)
    with pytest.raises(DataError, match=r"data\.long_answers=cut cuts the end of its answer"):
        Encoder(tokenizers[case], max_length=160).encode(row)
    fits = asked(f"Who?\n{sentence}\nAnswer:", "good", cut=sentence)
    need = len(Encoder(tokenizers[case], max_length=5000).encode(fits)[0]["input_ids"])
    encoder = Encoder(tokenizers[case], max_length=need - 5, long_answers="cut")
    assert encoder.encode(fits) == Encoder(tokenizers[case], max_length=need - 5).encode(fits)  # the input suffices
    assert encoder.cut_answers == 0


def test_without_a_cut_span_nothing_is_cut() -> None:
    with pytest.raises(DataError, match="0 are input that may be cut"):
        Encoder(byte_level(), max_length=10).encode(asked("What is the name of this town in the year?", "good"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_longest_turn_is_cut_first(tokenizers: Any, case: Any) -> None:
    long, short = " ".join(["river"] * 30), "Who was the mayor?"
    row = example(("system", "Be good."), ("user", short), ("assistant", "bad"), ("user", long), ("assistant", "good"))
    whole = Encoder(tokenizers[case], max_length=5000).encode(row)[-1]
    encoder = Encoder(tokenizers[case], max_length=len(whole["input_ids"]) - 15)
    cut = encoder.encode(row)[-1]
    kept = inner(encoder, cut["input_ids"])
    assert short in kept
    assert "Be good." in kept
    assert 5 < kept.count("river") < 30
    assert supervised(cut) == supervised(whole)


def test_equally_long_turns_are_cut_alike() -> None:
    text = " ".join(["river"] * 30)
    row = example(("user", text), ("assistant", "bad"), ("user", text), ("assistant", "good"))
    length = len(Encoder(byte_level(), max_length=5000).encode(row)[0]["input_ids"])
    encoder = Encoder(byte_level(), max_length=length - 20)
    first, second = inner(encoder, encoder.encode(row)[0]["input_ids"]).split("bad")
    assert abs(first.count("river") - second.count("river")) <= 1


def test_a_cut_span_keeps_its_place_when_a_template_strips_the_turn() -> None:
    sentence = " ".join(f"w{i}" for i in range(40))
    content = f"  \n {sentence} \n "
    turns = (Turn("system", "Be good."), Turn("user", content, (0, len(content))), Turn("assistant", "good"))
    for template in (HEADERS, NO_SYSTEM):
        encoder = Encoder(byte_level(template), max_length=100)
        [row] = encoder.encode(Example("f", 0, turns))
        kept = inner(encoder, row["input_ids"])
        assert len(row["input_ids"]) == 100
        assert "Be good." in kept
        assert "w0 w1" in kept
        assert "w38 w39" in kept


# --- chat templates ---


def test_a_template_without_system_gets_its_text_in_the_first_question() -> None:
    encoder = Encoder(byte_level(NO_SYSTEM), max_length=200)
    [row] = encoder.encode(CONVERSATIONS[6])
    assert "user\nBe good.\n\nWho?" in inner(encoder, row["input_ids"])


def test_a_template_that_rewrites_earlier_turns_gives_one_sequence_an_answer() -> None:
    encoder = Encoder(byte_level(THINKING), max_length=2000)
    rows = encoder.encode(CONVERSATIONS[7])
    assert [encoder.decode(supervised(row)) for row in rows] == ["the mayor", "of the river", "bad"]
    for turns, row in zip((2, 4, 6), rows, strict=True):
        prompt = encoder.prompt(Example("f", 0, CONVERSATIONS[7].turns[:turns]), reserve=0)
        assert row["input_ids"][: len(prompt)] == prompt
        assert set(row["labels"][: len(prompt)]) == {-100}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}", "an answer changes what stands before it"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "it leaves out turn 1 (user)"),
        (
            CHATML.replace(
                "{{ m['content'] }}", "{{ m['content'] | upper if m['role'] == 'assistant' else m['content'] }}"
            ),
            "becomes 'THE GOOD",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(template: str, reason: str) -> None:
    with pytest.raises(DataError) as error:
        Encoder(byte_level(template), max_length=200).encode(CONVERSATIONS[0])
    for part in ("f.json: row 1: ", "chat template", reason, "data.template=plain"):
        assert part in str(error.value)


def test_the_template_can_be_chosen() -> None:
    tokenizer = byte_level(CHATML)
    assert "im_start" in tokenizer.decode(Encoder(tokenizer, max_length=200).encode(CONVERSATIONS[0])[0]["input_ids"])
    [row] = Encoder(tokenizer, max_length=200, template="plain").encode(CONVERSATIONS[0])
    assert tokenizer.decode(row["input_ids"]) == "What is the name of this town? the good river</s>"
    with pytest.raises(ConfigError, match=r"data\.template: .* no chat template"):
        Encoder(byte_level(), max_length=200, template="chat")


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    "date",
    [
        "date_string if date_string is defined else strftime_now('%d %b %Y')",
        "strftime_now('%d %b %Y')",
        'strftime_now( "%d %b" ) + " 2024" if strftime_now is defined',
    ],
)
def test_the_date_in_a_template_is_a_fixed_one(date: str, template: str) -> None:
    encoder = Encoder(byte_level(f"{{{{ {date} }}}}\n" + template), max_length=200)
    [row] = encoder.encode(CONVERSATIONS[0])
    assert encoder.tokenizer.decode(row["input_ids"]).startswith("26 Jul 2024\n")
    assert encoder.tokenizer.decode(encoder.prompt(CONVERSATIONS[0], 0)).startswith("26 Jul 2024\n")


def test_the_tokens_that_end_an_answer() -> None:
    tokenizer = byte_level(CHATML)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    assert Encoder(tokenizer, max_length=50).stop_ids == sorted([ids["</s>"], ids["<|im_end|>"]])
    assert Encoder(tokenizer, max_length=50, template="plain").stop_ids == [ids["</s>"]]
    assert Encoder(byte_level(HEADERS), max_length=50).stop_ids == sorted([ids["</s>"], ids["<|eot|>"]])
    assert Encoder(byte_level(eos_token=None, pad_token="<s>"), max_length=50).stop_ids == []


def test_a_tokenizer_without_an_end_token_ends_with_the_answer() -> None:
    tokenizer = byte_level(eos_token=None, pad_token="<s>")
    encoder = Encoder(tokenizer, max_length=50)
    assert tokenizer.decode(encoder.encode(CONVERSATIONS[0])[0]["input_ids"]).endswith(" the good river")


# --- tokenizers and lengths ---


def test_a_tokenizer_is_loaded_with_a_padding_token(tmp_path: Path) -> None:
    for name, options, pad in [
        ("own", {"pad_token": "<|eot|>"}, "<|eot|>"),
        ("end", {"pad_token": None}, "</s>"),
        ("unknown", {"pad_token": None, "eos_token": None, "unk_token": "<s>"}, "<s>"),
    ]:
        byte_level(**options).save_pretrained(tmp_path / name)
        loaded = load_tokenizer(ModelConfig(name=str(tmp_path / name)))
        assert loaded.pad_token == pad
        assert len(loaded) == len(byte_level(**options))
    byte_level(pad_token=None, eos_token=None).save_pretrained(tmp_path / "none")
    with pytest.raises(ConfigError, match="no padding, end or unknown token"):
        load_tokenizer(ModelConfig(name=str(tmp_path / "none")))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: there is no folder .*gone"):
        load_tokenizer(ModelConfig(name=str(tmp_path / "gone")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.name: .* holds no tokenizer; one of tokenizer\.json"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"model\.name: .* is a file"):
        load_tokenizer(ModelConfig(name=str(tmp_path / "config.json")))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model\.name: .* cannot be read"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


def test_max_length_is_at_most_the_context() -> None:
    def config(context: int | None) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=context))

    assert resolve_max_length(None, config(512)) == 512
    assert resolve_max_length(512, config(512)) == 512
    assert resolve_max_length(64, config(None)) == 64
    with pytest.raises(ConfigError, match=r"data\.max_length: 513 .* 512"):
        resolve_max_length(513, config(512))
    with pytest.raises(ConfigError, match=r"data\.max_length"):
        resolve_max_length(None, config(None))


# --- real tokenizers, real rows ---


@needs_shared
@pytest.mark.parametrize("folder", ["models/stories260K/hf", "tokenizers/gpt2"])
def test_real_rows_survive_real_tokenizers(folder: str) -> None:
    tokenizer = load_tokenizer(ModelConfig(name=str(SHARED / "data" / folder)))
    encoder = Encoder(tokenizer, max_length=512)
    limits = DataConfig(train_rows=60, test_rows=10)
    order = ["dbpedia", "WiC", "COPA"]
    tasks = load_stream(StreamConfig(path=str(SHARED / "data/cl_benchmark"), order=order), limits).tasks
    order = ["C-STANCE", "Py150", "NumGLUE-ds"]
    tasks += load_stream(StreamConfig(path=str(SHARED / "data/trace/LLM-CL-Benchmark_500"), order=order), limits).tasks
    same = 0
    for task in tasks:
        for row, source in zip(encoder.encode_all(task.train), task.train, strict=True):
            length = encoder.answer_length(source)
            answer, prompt = row["input_ids"][-length:], encoder.prompt(source, reserve=length)
            assert row["input_ids"] == prompt + answer
            assert supervised(row) == answer
            assert encoder.decode(answer) == source.answer
            assert answer[-1] == tokenizer.eos_token_id
            text = source.question + ("" if source.question[-1].isspace() else " ") + source.answer
            whole = tokenizer(text, split_special_tokens=True)["input_ids"]
            if len(whole) < 512:
                same += row["input_ids"][:-1] == whole
                assert tokenizer.decode(row["input_ids"][:-1]) == tokenizer.decode(whole)
    assert same > 150


@needs_shared
def test_real_texts_are_read_in_windows() -> None:
    tokenizer = load_tokenizer(ModelConfig(name=str(SHARED / "data/models/stories260K/hf")))
    text = (SHARED / "data/general/wiki_demo.txt").read_text("utf-8").splitlines()[0]
    rows = Encoder(tokenizer, max_length=512).encode(Example("wiki", 0, text=text))
    assert [token for row in rows for token in row["labels"][1:]] == tokenizer(text)["input_ids"][1:]
    assert {len(row["input_ids"]) for row in rows[:-1]} == {512}
