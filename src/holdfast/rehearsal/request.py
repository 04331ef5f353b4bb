"""How a model is asked for samples of itself: from one token on, or as both sides of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from holdfast.api.rows import IGNORED, TokenRow
from holdfast.data.encode import DATE, Encoder
from holdfast.data.tokens.domains import domain_ids, domain_token
from holdfast.errors import ConfigError, did_you_mean
from holdfast.models.sampling import Sampler, Samples

LENGTH = 1024  # tokens of a sample where the model's context is longer
_WORDS = "\ufdd0"  # a noncharacter of Unicode, which text does not hold: it stands for what the user says


@dataclass(frozen=True)
class OwnSample:
    """What a model wrote.

    Attributes:
        row: ``input_ids`` and ``labels``: drawn tokens are supervised; those that it was given are not.
        log_prob: of all drawn tokens together under the model, in nats.
        hidden: the last hidden states that they were drawn from, [tokens - 1, hidden], where asked for.
    """

    row: TokenRow
    log_prob: float
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """What a model is given to write samples of itself.

    Attributes:
        start: without a chat, the tokens that samples begin with, one each, in turn: the domains', or the begin token;
            of a chat, what stands before the user's words.
        length: tokens of a sample at most; without a chat, each has as many.
        turn: of a chat, what stands between the user's words and the answer; its first token ends a turn. The model
            speaks for both, as it would go on: the user's words until that token, with at most half of the room, then
            the answer.
        stops: tokens that end an answer.
        temperature: of the draws.
    """

    start: tuple[int, ...]
    length: int
    turn: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    temperature: float = 1.0

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        context: int | None,
        begin: int | None = None,
        *,
        length: int | None = None,
        domain: str | Sequence[str] | None = None,
        token: int | None = None,
        chat: bool | None = None,
        temperature: float = 1.0,
    ) -> Request:
        """The request for a model.

        Args:
            context: tokens that the model reads at most, where it says so.
            begin: the begin token that the model's configuration names; it counts where it is a domain's, as in a
                model of the laboratory, or where the tokenizer has none.
            length: where absent, the context, at most 1,024.
            domain: name of the domain whose token a sample begins with, or the token itself; of several, each in turn.
            token: the number of that token, instead.
            chat: where absent, whether the tokenizer has a chat template, unless a domain or token is given.

        Raises:
            ConfigError: the tokenizer has no such domain or token, no begin token or no chat template, the template
                does not show where a turn ends, the length is beyond the context or leaves no room, or the temperature
                is not above 0.
        """
        if length is not None and context is not None and length > context:
            raise ConfigError(f"length: {length} is more than the model's context of {context} tokens")
        if not temperature > 0:
            raise ConfigError(f"temperature: {temperature} cannot divide logits; it must be above 0")
        if token is not None and not 0 <= token < len(tokenizer):
            raise ConfigError(f"prompt token: {token} is none of the tokenizer's {len(tokenizer)} tokens")
        length = length or min(context or LENGTH, LENGTH)
        if chat is None:
            chat = bool(tokenizer.chat_template) and domain is None and token is None
        if not chat:
            domains = [domain] if domain is None or isinstance(domain, str) else domain
            firsts = [token] if token is not None else [_first(tokenizer, name, begin) for name in domains]
            request = cls(tuple(firsts), length, temperature=temperature)
        elif domain is not None or token is not None:
            raise ConfigError("chat: a chat begins as its template does, so it takes no domain")
        else:
            start, turn = _chat(tokenizer)
            stops = Encoder(tokenizer, max_length=length, template="chat").stop_ids
            request = cls(start, length, turn, tuple(stops), temperature)
        given = len(request.start) + len(request.turn) if request.turn else 1
        if length < given + 2 * bool(request.turn) + 1:
            raise ConfigError(f"length: {length} leaves no room beside the {given} tokens that a sample is given")
        return request

    def write(self, draw: Sampler, seed: int | str, numbers: Sequence[int], hidden: bool = False) -> list[OwnSample]:
        """One sample a number; each depends on the seed, its number and the model alone, up to float rounding."""
        options: dict[str, Any] = {"numbers": numbers, "temperature": self.temperature, "hidden": hidden}
        if not self.turn:
            firsts = [[self.start[number % len(self.start)]] for number in numbers]
            found = draw(firsts, max_new_tokens=self.length - 1, seed=seed, **options)
            return [_sample(found, i, [(first, found.tokens[i])]) for i, first in enumerate(firsts)]
        start, room = list(self.start), self.length - len(self.start)
        stops = {self.turn[0], *self.stops}
        words = draw(
            [start] * len(numbers),
            max_new_tokens=(room - len(self.turn) + 1) // 2,
            seed=f"{seed}/user",
            stop_token_ids=stops,
            **options,
        )
        said = [i for i in range(len(numbers)) if words.tokens[i][-1] == self.turn[0]]
        given = list(self.turn[1:])
        prompts = [start + words.tokens[i] + given for i in said]
        answers = draw(
            prompts,
            max_new_tokens=[self.length - len(prompt) for prompt in prompts],
            seed=f"{seed}/assistant",
            stop_token_ids=self.stops,
            **options | {"numbers": [numbers[i] for i in said]},
        )
        samples = [_sample(words, i, [(start, words.tokens[i])]) for i in range(len(numbers))]
        for k, i in enumerate(said):
            parts = [(start, words.tokens[i]), (given, answers.tokens[k])]
            samples[i] = _sample(answers, k, parts, words.log_probs[i])
        return samples


def _sample(found: Samples, number: int, parts: list[tuple[list[int], list[int]]], log_prob: float = 0.0) -> OwnSample:
    """A sample of (given, drawn) tokens in turn, the last of which are those of ``found``."""
    row = {
        "input_ids": [token for given, drawn in parts for token in given + drawn],
        "labels": [label for given, drawn in parts for label in [IGNORED] * len(given) + drawn],
    }
    return OwnSample(row, log_prob + found.log_probs[number], found.hidden[number] if found.hidden else None)


def _first(tokenizer: Any, domain: str | None, begin: int | None) -> int:
    """The token that a sample begins with: a domain's, or the begin token, or what ends a text and so begins one."""
    known = domain_ids(tokenizer)
    if domain is not None:
        vocabulary = tokenizer.get_vocab()
        if domain not in known and domain not in vocabulary:
            raise ConfigError(
                f"domain: the tokenizer has no token {domain_token(domain)} or {domain!r}{did_you_mean(domain, known)}"
            )
        return known[domain] if domain in known else vocabulary[domain]
    own = begin if begin in known.values() else None
    first = next((t for t in (own, tokenizer.bos_token_id, begin, tokenizer.eos_token_id) if t is not None), None)
    if first is None:
        raise ConfigError(
            "domain: the tokenizer has no begin or end token, so name the token that a sample begins with"
        )
    return first


def _chat(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before the user's words, and what between them and the answer, from the token that ends a turn on."""
    if not tokenizer.chat_template:
        raise ConfigError("chat: the tokenizer has no chat template")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _WORDS}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string=DATE,
    )
    before, words, after = text.partition(_WORDS)
    start, turn = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    known = tokenizer.added_tokens_decoder
    end = next((place for place, token in enumerate(turn) if token in known and known[token].special), None)
    if not words or not start or end is None:
        raise ConfigError(
            "chat: the tokenizer's chat template puts no special token after the user's words, so that nothing shows "
            f"where they end: {text.replace(_WORDS, '...')!r}; chat: false samples without it"
        )
    return tuple(start), tuple(turn[end:])
