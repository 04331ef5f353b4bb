"""OpenAI's interface: answers are the model's, parameters are followed or refused, and nobody blocks the others."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("starlette", reason="needs the extra [serve]")

from holdfast.deploy.openai.limits import Limits
from holdfast.deploy.openai.text import Decoder, Increments
from holdfast.errors import ConfigError
from holdfast.models.batcher import Job, Sampling
from holdfast.models.generation import generate
from holdfast.models.likelihood import token_losses
from support.service import ask, ask_all, complete, events, on_a_socket, service, with_bad_weights
from support.tiny import tiny_tokenizer, write_model

TEXTS = ["red: ab?", "q", "green and blue: 12 + 5", "tide"]


@pytest.fixture(scope="module")
def app() -> Any:
    return service()


@pytest.fixture(scope="module")
def model(app: Any) -> Any:
    return app.served.backend.batcher._model


def encoded(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


def greedy(model: Any, text: str, tokens: int) -> list[int]:
    return generate(model, [encoded(text)], max_new_tokens=tokens, batch_size=1, eos_token_ids=[2], pad_token_id=0)[0]


def nats(model: Any, ids: list[int], start: int) -> float:
    """The negative log-likelihood of the tokens from ``start`` on."""
    labels = [-100] * start + ids[start:]
    losses, _ = token_losses(model, [{"input_ids": ids, "labels": labels}], batch_size=1, pad_token_id=0)
    return float(losses[0])


def test_prompts_of_every_kind_get_the_greedy_answer(app: Any, model: Any):
    ids = [encoded(text) for text in TEXTS]
    expected = [tiny_tokenizer().decode(greedy(model, text, 11), skip_special_tokens=True) for text in TEXTS]
    assert len(set(expected)) == len(TEXTS)
    for prompt in (TEXTS, ids):
        assert [choice["text"] for choice in complete(app, prompt, max_tokens=11)] == expected
        assert [choice["text"] for choice in complete(app, prompt[0], max_tokens=11)] == expected[:1]
    streamed = complete(app, TEXTS, max_tokens=11, stream=True, n=2)
    assert [choice["text"] for choice in streamed] == [text for text in expected for _ in range(2)]
    assert [choice["text"] for choice in complete(app, TEXTS[0], max_tokens=11, echo=True)] == [TEXTS[0] + expected[0]]


def test_log_probabilities_are_holdfasts_likelihoods(app: Any, model: Any):
    """As lm_eval asks for them: with echo; and of generated tokens, by completions and by chat."""
    for choice, text in zip(complete(app, TEXTS[:3], max_tokens=1, echo=True, logprobs=1), TEXTS[:3], strict=True):
        if text == "q":
            continue  # one token: nothing is predicted
        ids, found = encoded(text), choice["logprobs"]
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert len(found["tokens"]) == len(ids) + 1
        assert -sum(found["token_logprobs"][1:-1]) == pytest.approx(nats(model, ids, 1), rel=1e-5)
        assert found["text_offset"][: len(text)] == list(range(len(text)))
        with torch.no_grad():
            likeliest = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        for place in range(1, len(ids)):
            own, top = found["token_logprobs"][place], max(found["top_logprobs"][place].values())
            assert (own == top) == (int(likeliest[place - 1]) == ids[place])
    answer = greedy(model, TEXTS[0], 6)
    ids = encoded(TEXTS[0]) + answer
    [choice] = complete(app, TEXTS[0], max_tokens=6, logprobs=0)
    assert -sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(nats(model, ids, len(ids) - 6), rel=1e-4)
    chat = {"messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    content = ask(app, "chat/completions", chat).json()["choices"][0]["logprobs"]["content"]
    assert -sum(one["logprob"] for one in content) == pytest.approx(nats(model, ids, len(ids) - 6), rel=1e-4)
    assert all(len(one["top_logprobs"]) == 3 and one["token"] == one["top_logprobs"][0]["token"] for one in content)
    [echoed] = complete(app, TEXTS[0], max_tokens=0, echo=True, logprobs=0)
    assert echoed["text"] == TEXTS[0] and len(echoed["logprobs"]["tokens"]) == len(encoded(TEXTS[0]))


def test_a_stop_text_leaves_no_trace(app: Any):
    [whole] = complete(app, TEXTS[0], max_tokens=20)
    text = whole["text"]
    for start in range(0, len(text) - 3, 2):
        for stop in (text[start : start + 3], [text[start : start + 2], text[-1]]):
            cut = min(text.find(one) for one in ([stop] if isinstance(stop, str) else stop))
            [choice] = complete(app, TEXTS[0], max_tokens=20, stop=stop, logprobs=0)
            assert (choice["text"], choice["finish_reason"]) == (text[:cut], "stop")
            assert "".join(choice["logprobs"]["tokens"]) == text[:cut]
            [streamed] = complete(app, TEXTS[0], max_tokens=20, stop=stop, stream=True, logprobs=0)
            assert (streamed["text"], streamed["finish_reason"]) == (text[:cut], "stop")
            tokens = [token for part in streamed["logprobs"] for token in part["tokens"]]
            assert "".join(tokens) == text[:cut]
    [choice] = complete(app, TEXTS[0], max_tokens=20, stop=["nothing of the kind"], stream=True)
    assert (choice["text"], choice["finish_reason"]) == (text, whole["finish_reason"])


def test_samples_follow_their_seed_and_probabilities(app: Any, model: Any):
    first = complete(app, "red", max_tokens=8, temperature=1.5, seed=3, n=4)
    assert first == complete(app, "red", max_tokens=8, temperature=1.5, seed=3, n=4)
    assert len({choice["text"] for choice in first}) > 1
    [likeliest] = complete(app, "red", max_tokens=8)
    assert complete(app, "red", max_tokens=8, temperature=2, top_p=1e-9)[0]["text"] == likeliest["text"]
    assert complete(app, "red", max_tokens=8, temperature=1e-30)[0]["text"] == likeliest["text"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded("red")])).logits[0, -1].double()
    expected = (logits / 0.7).softmax(-1)
    order = expected.argsort(descending=True)
    kept = order[: int((expected[order].cumsum(0) < 0.8).sum()) + 1]
    job = Job([3], 1, Sampling(temperature=0.7, top_p=0.8, seed=0), lambda _: True, lambda _: None, None)
    counts = torch.bincount(torch.tensor([job._sample(logits.float()) for _ in range(4000)]), minlength=len(expected))
    assert set(counts.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    share = expected[kept] / expected[kept].sum()
    assert torch.allclose(counts[kept].double() / 4000, share, atol=0.04)


def test_biases_and_penalties_change_what_is_likeliest(app: Any, model: Any):
    forced = tiny_tokenizer().convert_tokens_to_ids("z")
    assert complete(app, "red", max_tokens=3, logit_bias={str(forced): 100})[0]["text"] == "zzz"
    ids, counts = encoded("red"), torch.zeros(64)
    for _ in range(20):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int((logits - 1.5 * (counts > 0) - 0.5 * counts).argmax()))
        counts[ids[-1]] += 1
        if ids[-1] == 2:
            break
    [choice] = complete(app, "red", max_tokens=20, presence_penalty=1.5, frequency_penalty=0.5)
    text = tiny_tokenizer().decode(ids[3:], skip_special_tokens=True)
    assert choice["text"] == text != complete(app, "red", max_tokens=20)[0]["text"]


def test_the_best_have_the_highest_mean_log_probability(app: Any):
    options = {"max_tokens": 5, "temperature": 1.3, "seed": 1, "logprobs": 0}
    everything = complete(app, "red", n=6, **options)

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = sorted(everything, key=mean, reverse=True)[:2]
    assert [c["text"] for c in complete(app, "red", n=2, best_of=6, **options)] == [c["text"] for c in best]


BAD: list[tuple[str, Any]] = [
    ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "5"), ("max_tokens", True), ("max_tokens", 10**30),
    ("max_tokens", 1000), ("temperature", -0.1), ("temperature", 3), ("temperature", "hot"), ("temperature", []),
    ("temperature", 10**400), ("top_p", 0), ("top_p", 2), ("n", 0), ("n", 10**6), ("n", {}), ("stream", "yes"),
    ("stop", ""), ("stop", [""]), ("stop", 3), ("stop", ["a"] * 99), ("stop", "a" * 999), ("seed", 2**70),
    ("seed", 0.5), ("presence_penalty", 9), ("frequency_penalty", "a"), ("logit_bias", {"a": 1}), ("logit_bias", []),
    ("logit_bias", {"99999": 1}), ("logit_bias", {"5": 1000}), ("logit_bias", {"-1": 1}), ("logit_bias", {"²": 1}),
    ("stream_options", {"include_usage": True}), ("stream_options", 5), ("model", 5),
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}), ("top_k", 3), ("guided_json", {}), ("min_tokens", 2),
]  # fmt: skip
BAD_COMPLETIONS = [
    ("prompt", None), ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", 5), ("prompt", {}), ("prompt", [-1]),
    ("prompt", [64]), ("prompt", [3, "a"]), ("prompt", [3, 10**5000]), ("prompt", [[3], [None]]), ("prompt", [True]),
    ("prompt", ["a", 3]), ("prompt", ["a"] * 200), ("prompt", "a" * 200), ("best_of", 0), ("best_of", 10**9),
    ("echo", 1), ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("suffix", "end"), ("messages", []),
]  # fmt: skip
BAD_CHATS = [
    ("messages", None), ("messages", []), ("messages", "hello"), ("messages", [5]), ("messages", [{}]),
    ("messages", [{"role": "wizard", "content": "a"}]), ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": 5}]), ("messages", [{"role": "user", "content": ""}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages", [{"role": "user", "content": "a", "mood": "glad"}]), ("messages", [{"role": "assistant"}]),
    ("messages", [{"role": "user", "content": "a" * 200}]), ("messages", [{"role": "tool", "content": "a"}]),
    ("top_logprobs", 2), ("logprobs", 2), ("max_completion_tokens", -3), ("prompt", "a"), ("echo", True),
    ("functions", [{"name": "f"}]),
]  # fmt: skip


def test_bad_values_are_refused_by_name(app: Any):
    good = {
        "completions": {"prompt": "red", "max_tokens": 2},
        "chat/completions": {"messages": [{"role": "user", "content": "red"}], "max_tokens": 2},
    }
    bad = {"completions": BAD + BAD_COMPLETIONS, "chat/completions": BAD + BAD_CHATS}
    asked: list[tuple[str, str, bytes]] = []
    for route, values in bad.items():
        for name, value in values:
            with_value = json.dumps(good[route] | {name: 0})
            if isinstance(value, list) and value[1:] == [10**5000]:
                raw = with_value.replace(f'"{name}": 0', f'"{name}": [3, 1{"0" * 5000}]')
                asked.append((route, "", raw.encode()))
            else:
                asked.append((route, name, json.dumps(good[route] | {name: value}).encode()))
    replies = ask_all(app, [(route, body) for route, _, body in asked])
    for (route, name, body), reply in zip(asked, replies, strict=True):
        error = reply.json()["error"]
        assert reply.status_code == 400, (route, body[:200], reply.text)
        assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
        assert not name or error["param"] == name, (body[:200], error)
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "seed": None}
    assert all(ask(app, route, body | neutral).status_code == 200 for route, body in good.items())
    assert ask(app, "completions", {"prompt": "a", "model": "other"}).json()["error"]["code"] == "model_not_found"


def test_bodies_that_are_no_request_are_refused():
    small = service(Limits(body=1000))
    bodies = [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}',
              b'{"prompt": "a", "top_p": 1e999}', b'{"prompt": "a", "seed": ' + b"9" * 900 + b"}", b"[" * 990,
              b'{"prompt": ' + b"[" * 480 + b"]" * 480 + b"}", b'{"prompt": "a", "prompt": "b"}']  # fmt: skip
    for body in bodies:
        reply = ask(small, "completions", body)
        assert reply.status_code == 400 and reply.json()["error"]["message"], body[:50]
    assert ask(service(), "completions", b"[" * 100_000).status_code == 400
    reply = ask(small, "completions", {"prompt": "a" * 2000})
    assert reply.status_code == 413 and "1000 bytes" in reply.json()["error"]["message"]
    assert ask(small, "nothing", {}).json()["error"]["message"] == "POST /v1/nothing: Not Found"


def test_the_context_is_a_limit_of_prompt_and_answer(app: Any):
    long = ask(app, "completions", {"prompt": "a" * 120, "max_tokens": 9}).json()["error"]
    assert long["code"] == "context_length_exceeded" and long["param"] == "max_tokens"
    assert "maximum context length is 128 tokens" in long["message"] and "129 tokens" in long["message"]
    assert len(ask(app, "completions", {"prompt": "a" * 127}).json()["choices"]) == 1
    assert ask(app, "completions", {"prompt": "a" * 128}).json()["error"]["param"] == "prompt"
    for route, body in (
        ("completions", {"prompt": "a" * 3_000_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 3_000_000}]}]}),
    ):
        assert ask(app, route, body).json()["error"]["code"] == "context_length_exceeded"
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")] * 150
    assert "300 turns; at most 256" in ask(app, "chat/completions", {"messages": turns}).text
    chat = {"messages": [{"role": "user", "content": "red"}]}
    used = ask(app, "chat/completions", chat).json()
    assert used["choices"][0]["finish_reason"] == "stop" or used["usage"]["total_tokens"] == 128
    limited = service(Limits(max_tokens=5))
    assert ask(limited, "chat/completions", chat).json()["usage"]["completion_tokens"] <= 5
    refused = ask(limited, "completions", {"prompt": "a", "max_tokens": 6}).json()["error"]
    assert refused["param"] == "max_tokens" and "5 that this server allows" in refused["message"]


def test_a_long_answer_does_not_block_a_short_one():
    """A sequence that is asked for while a long one is under way ends first."""
    batcher = service(context=4096).served.backend.batcher
    order: list[str] = []
    done = {name: threading.Event() for name in ("long", "short")}

    def job(name: str, tokens: int, take: Any) -> Job:
        def end(error: BaseException | None) -> None:
            assert error is None
            order.append(name)
            done[name].set()

        return Job([5, 6, 7], tokens, Sampling(), take, end, name)

    taken = 0

    def long(_: Any) -> bool:
        nonlocal taken
        taken += 1
        if taken == 3:
            batcher.submit([job("short", 4, lambda _: False)])
        return taken > 3 and done["short"].is_set()

    batcher.submit([job("long", 4000, long)])
    assert done["long"].wait(120) and order == ["short", "long"]


def test_sequences_at_once_are_limited_and_an_owner_does_not_take_them_all():
    batcher = service(Limits(concurrency=3), batch=2).served.backend.batcher
    seen: list[tuple[int, int]] = []
    left = threading.Semaphore(0)

    def job(owner: str) -> Job:
        def take(_: Any) -> bool:
            seen.append((batcher._running.total(), batcher._running["greedy"]))
            return False

        return Job([5, 6], 4, Sampling(), take, lambda _: left.release(), owner)

    batcher.submit([job("greedy") for _ in range(7)] + [job("modest") for _ in range(2)])
    assert all(left.acquire(timeout=120) for _ in range(9))
    assert max(total for total, _ in seen) == 3 and max(greedy for _, greedy in seen) == 2
    assert batcher.busy == 0


async def leave(app: Any, body: dict[str, Any]) -> None:
    """Ask for a stream, and leave at its first event."""
    began, sent = asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await began.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            began.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await app.application()(scope, receive, send)


def test_a_client_that_leaves_frees_its_slot():
    app = service(Limits(requests=1), context=20_000)
    asyncio.run(leave(app, {"prompt": "red", "max_tokens": 19_000, "stream": True, "logit_bias": {"2": -100}}))
    assert app.inside == 0
    while app.served.backend.batcher.busy:
        time.sleep(0.01)
    assert ask(app, "completions", {"prompt": "red"}).status_code == 200


def test_too_many_requests_and_such_as_take_too_long_are_refused():
    long = {"prompt": "red", "max_tokens": 19_000, "logit_bias": {"2": -100}}
    app = service(Limits(requests=2, seconds=0.3), context=20_000)
    replies = ask_all(app, [("completions", json.dumps(long).encode())] * 3)
    assert sorted(reply.status_code for reply in replies) == [429, 504, 504]
    assert {reply.json()["error"]["code"] for reply in replies} == {"rate_limit_exceeded", "timeout"}
    assert app.inside == 0
    with pytest.raises(ConfigError, match="--timeout: must be more than 0"):
        Limits(seconds=float("nan"))
    streamed = ask(app, "completions", long | {"stream": True}).text
    assert json.loads(streamed.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    while app.served.backend.batcher.busy:
        time.sleep(0.01)


def test_a_model_that_fails_says_so():
    app = service(model=with_bad_weights())
    reply = ask(app, "completions", {"prompt": "red"})
    assert reply.status_code == 500 and "logits are not finite" in reply.json()["error"]["message"]
    assert "logits are not finite" in ask(app, "completions", {"prompt": "red", "stream": True}).text
    assert app.served.backend.batcher.busy == 0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte is a token."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!", eos_token='"')


def word_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece: a space belongs to the word after it, and the first one is not written."""
    signs = ["<unk>", "</s>", *(f"▁{word}" for word in ("a", "tide", "rises")), "s", "."]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>")


def test_text_comes_in_whole_characters_and_keeps_its_spaces():
    tokenizer = byte_tokenizer()
    text = "né 한국어 👩‍🚀 — a"
    ids = tokenizer(text)["input_ids"]
    increments = Increments(Decoder(tokenizer), ids[:2])
    parts = [increments.add(token) for token in ids[3:]]
    assert "".join(parts) + increments.rest() == tokenizer.decode(ids[3:])
    assert not any("\ufffd" in part for part in parts[3:])
    increments = Increments(Decoder(tokenizer))
    broken = [increments.add(token) for token in tokenizer("é" * 30)["input_ids"][::2]]
    assert len("".join(broken)) >= 16, "what is no character is not held back for ever"
    words = word_tokenizer()
    assert "".join(map(Increments(Decoder(words), [2]).add, [3, 4, 5, 6])) == " tide risess."
    assert Decoder(words).token(3) == " tide"


def test_chat_is_rendered_by_the_template_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}{{ 'a:' if add_generation_prompt }}"
    )
    app = service(tokenizer=tokenizer)
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}]},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "ho", "refusal": None, "annotations": []},
        {"role": "user", "content": "hi"},
    ]
    asked = {"messages": messages, "max_tokens": 9}
    content = ask(app, "chat/completions", asked).json()["choices"][0]["message"]["content"]
    [same] = complete(app, "s:be\nu:hi\na:ho\nu:hi\na:", max_tokens=9)
    assert content == same["text"] != ""
    streamed = events(
        ask(app, "chat/completions", asked | {"stream": True, "stream_options": {"include_usage": True}}).text
    )
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    parts = [part["delta"].get("content", "") for event in streamed for part in event["choices"]]
    assert "".join(parts) == content
    assert streamed[-1]["usage"]["completion_tokens"] == 9 and streamed[-2]["choices"][0]["finish_reason"] == "length"


def test_lm_eval_and_the_openai_client_get_right_answers(app: Any, model: Any, tmp_path: Any, monkeypatch: Any):
    """Through a socket: likelihoods, generations, chats and streams."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="lm_eval asks endpoints with it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    write_model(tmp_path)
    pairs = [("red: ab?", " r"), ("tide and", " blue"), ("q", "z"), ("green", " one")]
    likeliest = greedy(model, "red: ab?", 1)
    pairs.append(("red: ab?", tiny_tokenizer().decode(likeliest)))

    def instances(kind: str, arguments: list[Any]) -> list[Any]:
        return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

    with on_a_socket(app) as url:
        common = {"model": "tiny", "tokenizer": str(tmp_path), "max_length": 128}
        for tokenized in (True, False):
            asked = LocalCompletionsAPI(
                base_url=f"{url}/completions", tokenized_requests=tokenized, batch_size=2, max_gen_toks=8, **common
            )
            found = asked.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
            for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
                ids = encoded(context + continuation)
                assert logprob == pytest.approx(-nats(model, ids, len(encoded(context))), rel=1e-4)
                assert is_greedy == (greedy(model, context, len(continuation)) == encoded(continuation))
            assert found[-1][1]
            until = [("red: ab?", {"until": ["\n"], "max_gen_toks": 8}), ("q", {"until": ["z"], "max_gen_toks": 8})]
            [first, second] = asked.generate_until(instances("generate_until", until), disable_tqdm=True)
            assert first == tiny_tokenizer().decode(greedy(model, "red: ab?", 8), skip_special_tokens=True)
            whole = tiny_tokenizer().decode(greedy(model, "q", 8), skip_special_tokens=True)
            assert second == whole.partition("z")[0]
        chat = LocalChatCompletion(base_url=f"{url}/chat/completions", max_gen_toks=8, **common)
        messages = [{"role": "user", "content": "red: ab?"}]
        prompt = chat.apply_chat_template(messages)
        [said] = chat.generate_until(instances("generate_until", [(prompt, {"until": ["\n"]})]), disable_tqdm=True)
        client = openai.OpenAI(base_url=url, max_retries=0)
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
        assert answer.choices[0].message.content == first.removeprefix(" ") == said
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said
        assert [one.id for one in client.models.list()] == ["tiny"]
        completed = client.completions.create(model="tiny", prompt=["red: ab?", "q"], max_tokens=8, logprobs=2, n=2)
        assert [choice.text for choice in completed.choices] == [first, first, whole, whole]
        with pytest.raises(openai.BadRequestError, match="tools: calls of tools are not read"):
            client.chat.completions.create(
                model="tiny", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
            )
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


VALUES = [
    None, True, False, 0, 1, -1, 2, 5, 63, 64, 1.5, -0.5, 1e308, 1e-320, 10**18, -(10**30), 10**400, "", "a", "0",
    "\ud800", "\0", "\x1b[2J", "é", "a" * 300, [], {}, [[]], [{}], ["a"], ["a", "b"], [3, 4], [[3, 4], [5]],
    [1.5], [None], {"a": 1}, {"3": 1}, {"3": "x"}, {"3": -100}, {"type": "text"}, {"include_usage": True},
    [3] * 127, [3] * 128, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}],
    [{"role": "tool", "content": "a"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant", "tool_calls": "x"}],
    [{"role": "user", "content": "a", "tool_calls": [{"function": 5}]}],
]  # fmt: skip


@pytest.mark.slow
def test_random_bodies_are_answered_or_refused(app: Any):
    """Never with a status of the server's own fault; damaged JSON, too."""
    chance = random.Random(7)
    keys = sorted({name for name, _ in BAD + BAD_COMPLETIONS + BAD_CHATS} | {"user", "store", "metadata"})
    requests = []
    for _ in range(3000):
        route = chance.choice(["completions", "chat/completions"])
        body: dict[str, Any] = {"max_tokens": chance.choice([1, 3])}
        body |= {"prompt": "red"} if route == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
        body |= {chance.choice(keys): chance.choice(VALUES) for _ in range(chance.choice([0, 1, 1, 1, 2]))}
        raw = bytearray(json.dumps(body).encode())
        if chance.random() < 0.1:
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        if chance.random() < 0.03:
            raw = raw[: chance.randrange(len(raw))]
        requests.append((route, bytes(raw)))
    counts = {200: 0, 400: 0, 404: 0}
    for start in range(0, len(requests), 50):
        part = requests[start : start + 50]
        for (_, body), reply in zip(part, ask_all(app, part), strict=True):
            assert reply.status_code in counts, (reply.status_code, body[:300], reply.text[:300])
            assert reply.status_code != 200 or '"error"' not in reply.text, (body, reply.text)
            counts[reply.status_code] += 1
    assert counts[200] > 300 and app.inside == app.served.backend.batcher.busy == 0


@pytest.mark.slow
def test_64_clients_among_slow_rude_and_huge_ones():
    """Everybody who asks properly gets the right answer, whatever the others do."""
    httpx2 = pytest.importorskip("httpx2")
    app = service(Limits(body=100_000), context=2000)
    model = app.served.backend.batcher._model
    texts = [f"red: {a}{b}?" for a in "abcdefgh" for b in "abcdefgh"]
    expected = {text: tiny_tokenizer().decode(greedy(model, text, 12), skip_special_tokens=True) for text in texts}
    chance, stop = random.Random(0), threading.Event()
    forever = {"prompt": "red", "max_tokens": 1900, "logit_bias": {"2": -100}}

    def raw(address: tuple[str, int], data: bytes, end: str) -> None:
        with socket.create_connection(address) as client:
            client.sendall(data)
            if end == "wait":
                stop.wait()
            elif end == "read little":
                client.recv(10)
                stop.wait()

    def head(length: int) -> bytes:
        return f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode()

    with on_a_socket(app) as url:
        address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        body, streamed = json.dumps(forever).encode(), json.dumps(forever | {"stream": True}).encode()
        crowd = [
            *[(b"POST /v1/comple", "wait")] * 8,
            *[(head(50) + b'{"prompt"', "wait")] * 8,
            *[(head(len(body)) + body, "leave")] * 8,
            *[(head(len(streamed)) + streamed, "read little")] * 4,
            *[(head(10**12), "wait")] * 4,
            *[(b"\x16\x03\x01 no HTTP at all\r\n\r\n", "wait")] * 4,
        ]
        rude = [threading.Thread(target=raw, args=(address, *one)) for one in crowd]
        answers: dict[str, str] = {}

        def ask_politely(text: str) -> None:
            with httpx2.Client(timeout=None) as client:
                time.sleep(chance.random())
                reply = client.post(f"{url}/completions", json={"prompt": text, "max_tokens": 12})
                answers[text] = reply.json()["choices"][0]["text"]

        polite = [threading.Thread(target=ask_politely, args=(text,)) for text in texts]
        huge = httpx2.post(f"{url}/completions", content=b" " * 200_000)
        assert huge.status_code == 413
        for thread in [*rude, *polite]:
            thread.start()
        for thread in polite:
            thread.join()
        stop.set()
        for thread in rude:
            thread.join()
        while app.inside:
            time.sleep(0.01)
    assert answers == expected
