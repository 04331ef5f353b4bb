"""What a model is given to write samples of itself: a first token, or a chat template in which it speaks for both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from torch import Tensor

from holdfast.api.rows import IGNORED, TokenRow, last_answer
from holdfast.data.chat import render
from holdfast.data.encode import Encoder
from holdfast.data.tokens.domains import domain_ids, domain_token
from holdfast.errors import ConfigError, DataError, did_you_mean
from holdfast.models.sampling import Sampler, Samples
from holdfast.models.seq2seq import answered_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 1024  # tokens of a sample where the model's context is longer
_WORDS = "\ufdd0"  # a noncharacter of Unicode, which no text contains, in the place of the user's words


@dataclass(frozen=True)
class OwnSample:
    """A sample that a model wrote.

    Attributes:
        row: ``input_ids`` and ``labels``: drawn tokens are supervised, given tokens are not.
        log_prob: of all drawn tokens together under the model, in nats.
        hidden: the last hidden states that they were drawn from, [tokens - 1, hidden], if asked for.
    """

    row: TokenRow
    log_prob: float
    hidden: Tensor | None = None


@dataclass(frozen=True)
class SampleOptions:
    """How samples begin, how long they are, and how they are drawn.

    Attributes:
        length: tokens of a sample at most; where absent, the model's context, at most 1,024.
        domain: name of the domain whose token a sample begins with, or the token itself; of several, each in turn.
        token: the number of that token, instead.
        chat: whether samples are chats; where absent, if the tokenizer has a chat template and neither domain nor
            token is given.
        temperature: of the draws.
    """

    length: int | None = None
    domain: str | Sequence[str] | None = None
    token: int | None = None
    chat: bool | None = None
    temperature: float = 1.0


PLAIN = SampleOptions()


@dataclass(frozen=True)
class Request:
    """What a model is given to write samples of itself.

    Attributes:
        start: without a chat, the first tokens of samples, one each, in turn: the domains', or the begin token; of a
            chat, the tokens before the user's words.
        length: tokens of a sample at most; without a chat, each has exactly as many.
        turn: of a chat, the tokens between the user's words and the answer; the first of them ends a turn. The model
            speaks for both: it draws the user's words until that token, with at most half of the room, and then the
            answer. Longer words are cut there, and answered, too.
        stops: tokens that end an answer.
        temperature: of the draws.
        decoder: the start token of a sequence-to-sequence model's decoder, which answers an encoder that reads
            ``start``; the end token ends a sample. None: the model is causal.
    """

    start: tuple[int, ...]
    length: int
    turn: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    temperature: float = 1.0
    decoder: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        begin: int | None = None,
        options: SampleOptions = PLAIN,
        decoder: int | None = None,
    ) -> Request:
        """The request for a model.

        Args:
            tokenizer: the model's.
            context: tokens that the model reads at most, if it says so.
            begin: the begin token of the model's configuration; it is used where it is a domain's, as in a model of the
                laboratory, or where the tokenizer has none.
            options: what the user wants.
            decoder: the start token of a sequence-to-sequence model's decoder.

        Raises:
            ConfigError: the tokenizer has no such domain or token, no begin token or no chat template, the template
                does not show where a turn ends, the length is beyond the context or leaves no room, or the temperature
                is not above 0.
        """
        length, domain, token, chat = options.length, options.domain, options.token, options.chat
        if length is not None and context is not None and length > context:
            raise ConfigError(f"length: {length} is more than the model's context of {context} tokens")
        if domain is not None and not domain:
            raise ConfigError("domain: names none; leave it out, and samples begin with the begin token")
        if domain is not None and token is not None:
            raise ConfigError("prompt token: a sample begins with it or with a domain's token; leave one of them out")
        if not 0 < options.temperature < math.inf:
            raise ConfigError(f"temperature: {options.temperature} cannot divide logits; it must be a number above 0")
        if token is not None and not 0 <= token < len(tokenizer):
            raise ConfigError(f"prompt token: {token} is none of the tokenizer's {len(tokenizer)} tokens")
        length = length or min(context or LENGTH, LENGTH)
        if chat and decoder is not None:
            raise ConfigError("chat: a sequence-to-sequence model answers, and does not speak for both; leave it out")
        if chat is None:
            chat = decoder is None and bool(tokenizer.chat_template) and domain is None and token is None
        if not chat:
            domains = [domain] if domain is None or isinstance(domain, str) else domain
            firsts = [token] if token is not None else [_first(tokenizer, name, begin) for name in domains]
            ends = () if decoder is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
            request = cls(tuple(firsts), length, (), ends, options.temperature, decoder)
        elif domain is not None or token is not None:
            raise ConfigError("chat: a chat begins as its template does, so it takes no domain")
        else:
            start, turn = _chat(tokenizer)
            stops = Encoder(tokenizer, max_length=length, template="chat").stop_ids
            request = cls(start, length, turn, tuple(stops), options.temperature)
        given = len(request.start) + len(request.turn) if request.turn else 1
        if length < given + 2 * bool(request.turn) + 1:
            raise ConfigError(f"length: {length} leaves no room beside the {given} tokens that a sample is given")
        return request

    def short(self, tokens: int) -> Request:
        """A request for samples of the same kind with so many drawn tokens."""
        return replace(self, turn=(), length=min(self.length, len(self.start) + tokens))

    def write(self, draw: Sampler, seed: int | str, numbers: Sequence[int], hidden: bool = False) -> list[OwnSample]:
        """One sample a number; each depends on the seed, its number and the model alone, up to float rounding."""
        if self.turn:
            return self._write_chats(draw, seed, numbers, hidden)
        firsts = [[self.start[number % len(self.start)]] for number in numbers]
        texts = draw(
            firsts,
            max_new_tokens=self.length - 1,
            seed=seed,
            numbers=numbers,
            temperature=self.temperature,
            stop_token_ids=self.stops,
            hidden=hidden,
        )
        if self.decoder is None:
            return [_sample(texts, i, [(first, texts.tokens[i])]) for i, first in enumerate(firsts)]
        rows = [answered_row(first, texts.tokens[i], self.decoder) for i, first in enumerate(firsts)]
        return [_own(row, texts, i) for i, row in enumerate(rows)]

    def _write_chats(self, draw: Sampler, seed: int | str, numbers: Sequence[int], hidden: bool) -> list[OwnSample]:
        """Draw the user's words, and then the answers; only words that ended as a text does have none."""
        start, room = list(self.start), self.length - len(self.start)
        words = draw(
            [start] * len(numbers),
            max_new_tokens=(room - len(self.turn) + 1) // 2,
            seed=f"{seed}/user",
            numbers=numbers,
            temperature=self.temperature,
            stop_token_ids={self.turn[0], *self.stops},
            hidden=hidden,
        )
        asked = [i for i, said in enumerate(words.tokens) if said[-1] == self.turn[0] or said[-1] not in self.stops]
        given = {i: list(self.turn[words.tokens[i][-1] == self.turn[0] :]) for i in asked}
        prompts = [start + words.tokens[i] + given[i] for i in asked]
        answers = draw(
            prompts,
            max_new_tokens=[self.length - len(prompt) for prompt in prompts],
            seed=f"{seed}/assistant",
            numbers=[numbers[i] for i in asked],
            temperature=self.temperature,
            stop_token_ids=self.stops,
            hidden=hidden,
        )
        samples = [_sample(words, i, [(start, words.tokens[i])]) for i in range(len(numbers))]
        for k, i in enumerate(asked):
            parts = [(start, words.tokens[i]), (given[i], answers.tokens[k])]
            samples[i] = _sample(answers, k, parts, words.log_probs[i])
        return samples


@dataclass(frozen=True)
class Prompts:
    """Given prompts, which a model answers.

    Attributes:
        prompts: their tokens, and the places of the pictures that they show.
        length: tokens of an answer at most.
        stops: tokens that end an answer.
        context: tokens that a causal model reads at most, if it says so.
        decoder: the start token of a sequence-to-sequence model's decoder; None: the model is causal.
    """

    prompts: tuple[tuple[int, ...], ...]
    length: int
    stops: tuple[int, ...]
    context: int | None = None
    decoder: int | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[TokenRow],
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        length: int | None = None,
        decoder: int | None = None,
    ) -> Prompts:
        """The prompts of rows, each of which ends with an answer.

        Args:
            length: tokens of an answer at most; where absent, the model's context, at most 1,024.

        Raises:
            DataError: no row has a prompt that leaves room for an answer.
        """
        asked = [tuple(row["encoder_ids"] if "encoder_ids" in row else last_answer(row)[0]) for row in rows]
        most = None if decoder is not None else context
        usable = [prompt for prompt in asked if prompt and (most is None or len(prompt) < most)]
        if not usable:
            raise DataError(f"prompts: none of the {len(rows)} rows has a prompt that leaves room for an answer")
        stops = Encoder(tokenizer, max_length=LENGTH).stop_ids
        return cls(tuple(usable), length or min(context or LENGTH, LENGTH), tuple(stops), most, decoder)

    def short(self, tokens: int) -> Prompts:
        """The same prompts with answers of so many tokens at most."""
        return replace(self, length=min(self.length, tokens))

    def write(self, draw: Sampler, seed: int | str, numbers: Sequence[int], hidden: bool = False) -> list[OwnSample]:
        """One answer a number; which prompt it answers, and the answer, follow from the seed and the number."""
        asked = [self.prompts[Random(f"{seed}/prompt/{number}").randrange(len(self.prompts))] for number in numbers]
        room = [self.length if self.context is None else min(self.length, self.context - len(one)) for one in asked]
        texts = draw(asked, max_new_tokens=room, seed=seed, numbers=numbers, stop_token_ids=self.stops, hidden=hidden)
        rows = [answered_row(prompt, texts.tokens[i], self.decoder) for i, prompt in enumerate(asked)]
        return [_own(row, texts, i) for i, row in enumerate(rows)]


def _sample(last: Samples, number: int, parts: list[tuple[list[int], list[int]]], log_prob: float = 0.0) -> OwnSample:
    """A sample of pairs of given and drawn tokens, of which ``last`` drew the last ones.

    Args:
        log_prob: of the tokens that were drawn before ``last``.
    """
    row = {
        "input_ids": [token for given, drawn in parts for token in given + drawn],
        "labels": [label for given, drawn in parts for label in [IGNORED] * len(given) + drawn],
    }
    return _own(row, last, number, log_prob)


def _own(row: TokenRow, last: Samples, number: int, log_prob: float = 0.0) -> OwnSample:
    return OwnSample(row, log_prob + last.log_probs[number], last.hidden[number] if last.hidden else None)


def _first(tokenizer: PreTrainedTokenizerBase, domain: str | None, begin: int | None) -> int:
    """The token that a sample begins with: a domain's, or the begin token, or else the end token, as between texts."""
    domains = domain_ids(tokenizer)
    if domain is not None:
        vocabulary = tokenizer.get_vocab()
        if domain not in domains and domain not in vocabulary:
            near = did_you_mean(domain, domains)
            raise ConfigError(f"domain: the tokenizer has no token {domain_token(domain)} or {domain!r}{near}")
        return domains[domain] if domain in domains else vocabulary[domain]
    of_domain = begin if begin in domains.values() else None
    candidates = of_domain, tokenizer.bos_token_id, begin, tokenizer.eos_token_id
    first = next((token for token in candidates if token is not None), None)
    if first is None:
        raise ConfigError(
            "domain: the tokenizer has no begin or end token, so name the token that a sample begins with"
        )
    return first


def _chat(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before the user's words, and those between them and the answer, from the token that ends a turn."""
    if not tokenizer.chat_template:
        raise ConfigError("chat: the tokenizer has no chat template")
    messages = [{"role": "user", "content": _WORDS}]
    text = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
    before, words, after = text.partition(_WORDS)
    start, turn = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    added = tokenizer.added_tokens_decoder
    end = next((place for place, token in enumerate(turn) if token in added and added[token].special), None)
    if not words or not start or end is None:
        raise ConfigError(
            "chat: the tokenizer's chat template puts no special token after the user's words, so that nothing shows "
            f"where they end: {text.replace(_WORDS, '...')!r}; chat: false samples without it"
        )
    return tuple(start), tuple(turn[end:])
