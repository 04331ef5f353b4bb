"""What a request asks about, as tokens."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from holdfast.api.task import Example
from holdfast.data.conversation import BadRowError, Noticed, conversation
from holdfast.data.encode import Encoder
from holdfast.data.encode_apart import ApartEncoder
from holdfast.data.encode_seen import SeeingEncoder
from holdfast.data.files import where
from holdfast.data.row_pictures import with_pictures
from holdfast.deploy.openai.errors import RequestError, too_long
from holdfast.deploy.openai.pictures import take_images
from holdfast.deploy.openai.request import MOST_ANSWERS, Body, ChatBody, CompletionBody
from holdfast.deploy.openai.text import Decoder
from holdfast.errors import DataError
from holdfast.models.pictures import Picture, is_place
from holdfast.models.pretrained import begin_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.models.sight import Sight

MOST_TURNS = 256  # of a conversation; a chat template is rendered once for each answer in it
SHORT = 16  # tokens of a completion where a request does not say how many, as with OpenAI


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        ids: its tokens.
        text: what is echoed.
        begin: how many of the tokens, at the beginning, are not of the text.
        max_tokens: of an answer to it.
        before: the tokens before an answer to it: the same, or the start token of a sequence-to-sequence model's
            decoder; the image token stands for a picture.
        pictures: what it shows.
    """

    ids: list[int]
    text: str
    begin: int
    max_tokens: int
    before: list[int]
    pictures: tuple[Picture, ...] = ()


class Prompts:
    """Reads the prompts of requests; threads may share it.

    Args:
        tokenizer: the run's.
        template: data.template of the run.
        context: tokens of a prompt with its answer, at most.
        vocabulary: the model's; token ids are below it.
        max_tokens: the most tokens of an answer that a request may ask for; None: what the context holds.
        sight: how the model sees; None: it reads text alone.
        pictures: that a request may show.
        start: the start token of a sequence-to-sequence model's decoder, whose prompts and answers have the context
            each; None: the model is causal.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Any,
        *,
        context: int,
        vocabulary: int,
        max_tokens: int | None = None,
        start: int | None = None,
        sight: Sight | None = None,
        pictures: int = 0,
    ):
        self.context, self.vocabulary, self._most, self._start = context, vocabulary, max_tokens, start
        self._sight, self._pictures = sight, pictures if sight is not None else 0
        self._lock = threading.Lock()
        # The tokenizer's library allows no change of a setting, which encoding makes, while something is decoded.
        self._tokenizer = copy.deepcopy(tokenizer)
        most = 2**40  # its own refusals are about rows
        self._encoder: Encoder
        if start is not None:
            self._encoder = ApartEncoder(self._tokenizer, max_length=most, start=start, template=template)
        elif sight is not None:
            self._encoder = SeeingEncoder(self._tokenizer, sight=sight, max_length=most, template=template)
        else:
            self._encoder = Encoder(self._tokenizer, max_length=most, template=template)
        self.decoder = Decoder(tokenizer)
        self.chat = self._encoder.chat
        self.ends = frozenset(self._encoder.stop_ids)
        self._begin = begin_tokens(self._tokenizer)
        self._longest = max(map(len, self._tokenizer.get_vocab()))  # characters of a token

    @property
    def sees(self) -> bool:
        """Whether the model reads pictures."""
        return self._sight is not None

    def of(self, request: Body) -> list[Prompt]:
        """The prompts of a request.

        Raises:
            RequestError: a prompt cannot be used, or does not fit into the context with its answer.
        """
        messages, pictures = list[dict[str, Any]](), list[Picture]()
        if isinstance(request, ChatBody):
            if len(request.messages) > MOST_TURNS:
                raise RequestError(f"messages: has {len(request.messages)} turns; at most {MOST_TURNS}", "messages")
            messages, pictures = take_images(request.messages, self._pictures)
        with self._lock:
            if isinstance(request, ChatBody):
                ids = self._conversation(messages, pictures)
                return [self._prompt(request, ids, "", 0, tuple(pictures))]
            assert isinstance(request, CompletionBody)
            if self._start is not None and request.echo and request.logprobs is not None:
                raise RequestError(
                    "echo: a sequence-to-sequence model reads its prompt and gives it no likelihood; leave echo or "
                    "logprobs out",
                    "echo",
                )
            return [self._prompt(request, *read) for read in self._completions(request.prompt)]

    def _prompt(
        self, request: Body, ids: list[int], text: str, begin: int, pictures: tuple[Picture, ...] = ()
    ) -> Prompt:
        chat = isinstance(request, ChatBody)
        param, key = ("messages" if chat else "prompt"), "max_tokens"
        if chat and request.max_tokens is None:
            key = "max_completion_tokens"
        before = ids if self._start is None else [self._start]
        if self._sight is not None:
            before = [self._sight.image_token_id if is_place(token) else token for token in ids]
        room, asked = self.context - len(before), request.limit
        if len(ids) > self.context:
            room = self.context - len(ids)
        if self._most is not None and (asked or 0) > self._most:
            raise RequestError(f"{key}: {asked} is more than the {self._most} that this server allows", key)
        if asked is None:
            asked = room if chat else min(room, SHORT)
            asked = max(1, asked if self._most is None else min(asked, self._most))
        if asked > room:
            raise too_long(self.context, max(len(ids), len(before)), asked, key if len(ids) < self.context else param)
        return Prompt(ids, text, begin, asked, before, pictures)

    def _conversation(self, given: Sequence[dict[str, Any]], pictures: Sequence[Picture]) -> list[int]:
        self._check_size(sum(_characters(message.get("content")) for message in given), "messages")
        noticed = Noticed()
        messages = [
            {key: value for key, value in message.items() if value is not None and (key, value) != ("annotations", [])}
            for message in given
        ]
        try:
            turns = conversation([*messages, {"role": "assistant", "content": "answer"}], "messages", noticed)
            if noticed.unused:
                raise BadRowError(f"{', '.join(sorted(noticed.unused))}: not used by this model; leave it out")
            return self._encoder.prompt(Example("messages", 0, with_pictures(turns, pictures)), reserve=0)
        except (BadRowError, DataError) as error:
            said = str(error).removeprefix(f"{where('messages', 0)}: ")
            raise RequestError(said, "messages") from None

    def _completions(self, prompt: Any) -> list[tuple[list[int], str, int]]:
        """The tokens, the text and the number of begin tokens of each prompt."""
        match prompt:
            case str():
                return [self._of_text(prompt)]
            case [int(), *_]:
                return [self._of_ids(prompt)]
            case [str() | list(), *_]:
                if len(prompt) > MOST_ANSWERS:
                    raise RequestError(f"prompt: has {len(prompt)} prompts; at most {MOST_ANSWERS} at once", "prompt")
                return [self._of_text(one) if isinstance(one, str) else self._of_ids(one) for one in prompt]
        raise RequestError("prompt: must be a text, a list of texts, a list of token ids or a list of such", "prompt")

    def _of_text(self, text: str) -> tuple[list[int], str, int]:
        self._check_size(len(text), "prompt")
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            raise RequestError("prompt: has no tokens; a model needs one to begin with", "prompt")
        self._check_text(ids)
        return ids, text, len(self._begin) if ids[: len(self._begin)] == self._begin else 0

    def _check_text(self, ids: list[int]) -> None:
        """Refuse the token that stands for a part of a picture."""
        if self._sight is not None and self._sight.image_token_id in ids:
            raise RequestError(
                f"prompt: has {self._sight.image_token!r} in it, which stands for a part of a picture; chats show "
                "pictures",
                "prompt",
            )

    def _check_size(self, characters: int, param: str) -> None:
        """Refuse what is too long whatever its tokens are, before time is spent on them."""
        if characters > self.context * self._longest:
            raise RequestError(
                f"This model's maximum context length is {self.context} tokens, which {characters} characters exceed.",
                param,
                code="context_length_exceeded",
            )

    def _of_ids(self, ids: Any) -> tuple[list[int], str, int]:
        if not isinstance(ids, list) or not ids:
            raise RequestError("prompt: has no tokens; a model needs one to begin with", "prompt")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                shown = f"{token!r:.40}" if not isinstance(token, int) or abs(token) < 2**63 else "a huge number"
                raise RequestError(f"prompt: {shown} is no token; tokens are 0 to {self.vocabulary - 1}", "prompt")
        self._check_text(ids)
        return ids, self.decoder.text(ids), 0


def _characters(content: Any) -> int:
    """The length of a message's content."""
    if isinstance(content, list):
        return sum(_characters(part.get("text")) for part in content if isinstance(part, dict))
    return len(content) if isinstance(content, str) else 0
