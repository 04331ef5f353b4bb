"""Soft prompts that do not show: put before the embedded input inside the model, cut off its outputs again.

A model with PEFT's prompt tuning gives logits that are longer than its input, and in a batch that is padded on the
left its prompts lie farther from the text the more padding there is. Here ``logits[b, i]`` predicts token i + 1 of
row b of the batch as it was given, so that losses, evaluation and generation need not know of prompts.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModelForCausalLM, PromptTuningConfig
from peft.config import PromptLearningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.api.rows import IGNORED, prompt
from holdfast.engines.pieces import full
from holdfast.errors import ConfigError
from holdfast.models.generation import evaluating
from holdfast.models.head import with_tensors
from holdfast.system.files import read_json, write_json
from holdfast.tuners.prompt_keys import nearest, prompt_mask, queries, similarity

NOT_MERGED = "its trained prompts stand before the input and change no weight"
"""Why soft prompts cannot be merged into a model."""

PADDED = (
    "vLLM and `transformers serve` do not load the soft prompts of tuner {name!r}; plain PEFT does, but in a batch "
    "that is padded on the left it gives shorter rows other positions than they were measured with: ask rows of "
    "different length one by one"
)
"""What a folder of soft prompts lacks where plain libraries load it."""

ENCODER = "prompt_encoder.safetensors"
KEYS = "prompt_keys.safetensors"
POOL = "prompt_pool.json"


class SoftPromptModel(PeftModelForCausalLM):
    """A causal language model with PEFT's prompt tuning (Lester et al., 2021, arXiv 2104.08691) or P-tuning.

    ``model(input_ids, attention_mask, labels)`` gives logits [rows, seq, vocab] and hidden states [rows, seq, hidden]
    of the tokens it was given, and the loss that they make; ``generate`` takes and gives tokens alone. What it saves
    loads with plain PEFT, which needs the prompts alone; of a network that makes them (P-tuning's) it also saves the
    weights, so that training goes on. The prompts stand before padding on the left; positions count from the first
    prompt on and leave padding out.
    """

    def __init__(
        self, model: PreTrainedModel, config: PromptLearningConfig, adapter_name: str = "default", **kwargs: Any
    ):
        super().__init__(model, config, adapter_name, **kwargs)
        self.base_model.register_forward_pre_hook(self._put, with_kwargs=True)
        self.base_model.register_forward_hook(self._cut, with_kwargs=True)

    @property
    def virtual_tokens(self) -> int:
        """How many prompt embeddings stand before every row."""
        return self.active_peft_config.num_virtual_tokens

    def prompts(self, inputs: dict[str, Any]) -> Tensor:
        """The prompt embeddings of each row, [rows, virtual tokens, embedding], with gradient.

        Args:
            inputs: of the forward pass: ``inputs_embeds`` [rows, seq, embedding], ``input_ids``, ``attention_mask``
                and ``labels``, each [rows, seq] or None.
        """
        return self.get_prompt(batch_size=len(inputs["inputs_embeds"]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        encoder = self.prompt_encoder[self.active_adapter]
        with evaluating(encoder):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        weights = {key: full(w).detach() for key, w in encoder.state_dict(keep_vars=True).items()}
        if is_main_process and len(weights) > 1:  # one is the prompt's own
            save_file({key: w.cpu().contiguous() for key, w in weights.items()}, Path(save_directory, ENCODER))

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        path = Path(model_id, ENCODER)
        if path.exists():
            return self.prompt_encoder[adapter_name].load_state_dict(load_file(path))
        return super().load_adapter(model_id, adapter_name, *args, **kwargs)

    def _put(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the base model's forward pass: put the prompts there, unless the cache has them already."""
        if self._adapters_disabled:
            return None
        known = inspect.signature(module.forward).parameters
        inputs = dict(zip(known, args, strict=False)) | kwargs
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        restarts = mask is None and positions is not None and bool((positions[:, 1:] == 0).any())
        if restarts or (mask is not None and mask.dim() != 2):
            raise ConfigError(
                "data.packing: a soft prompt stands before a row, so several rows cannot share a sequence; turn "
                "packing off"
            )
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            if mask is not None:
                inputs["attention_mask"] = nn.functional.pad(mask, (self.virtual_tokens, 0), value=1)
            if positions is not None:
                inputs["position_ids"] = positions + self.virtual_tokens
            return (), inputs

        if mask is not None and positions is None and "position_ids" in known:
            positions = (mask.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        self._insert(module, inputs, positions)
        return (), inputs

    def _insert(self, module: Any, inputs: dict[str, Any], positions: Tensor | None) -> None:
        """Put the prompts into the inputs of a forward pass that begins; ``positions`` are those of the tokens."""
        mask, embeds, labels = (inputs.get(key) for key in ("attention_mask", "inputs_embeds", "labels"))
        if embeds is None:
            embeds = module.get_input_embeddings()(inputs["input_ids"])
        inputs["inputs_embeds"] = embeds
        prompts = self.prompts(inputs).to(embeds.dtype)
        virtual = prompts.shape[1]
        inputs |= {"input_ids": None, "inputs_embeds": torch.cat([prompts, embeds], dim=1)}
        if mask is not None:
            inputs["attention_mask"] = nn.functional.pad(mask, (virtual, 0), value=1)
        if positions is not None:
            before = torch.arange(virtual, device=positions.device).expand(len(positions), -1)
            inputs["position_ids"] = torch.cat([before, positions + virtual], dim=1)
        if labels is not None:  # a row's first token has nothing before it that predicts it, and still has not
            inputs["labels"] = nn.functional.pad(labels[:, 1:], (virtual + 1, 0), value=IGNORED)
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            inputs["logits_to_keep"] = inputs["logits_to_keep"] + virtual

    def _cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """After it: leave what belongs to the row's own tokens."""
        embeds = kwargs.get("inputs_embeds")
        if self._adapters_disabled or embeds is None:
            return outputs
        virtual = self.virtual_tokens
        own = embeds.shape[1] - virtual
        outputs["logits"] = outputs.logits[:, -own:]
        if outputs.get("hidden_states") is not None:
            outputs["hidden_states"] = tuple(states[:, -own:] for states in outputs.hidden_states)
        return outputs


class PromptPoolModel(SoftPromptModel):
    """A pool of soft prompts, of which the nearest to a row's prompt tokens are put before it.

    Wang et al., 2022, Learning to Prompt, arXiv 2112.08654, equations 2 and 3. Each soft prompt has a key. A row's
    query is the frozen model's mean last hidden state over the tokens before its answer: those before the first
    supervised label where the forward pass has labels; those that :meth:`remember` and :meth:`knowing` were told of,
    where it has none; otherwise all of them, as in generation.

    In training mode the outputs also have ``chosen``, int64 [rows, top_k], which prompts each row got, and
    ``key_similarity``, float32 [rows, top_k], the cosines of its query and their keys, with gradient to the keys.

    Attributes:
        prompt_keys: the keys, an embedding of [size, hidden].
        frequency: [size], how often each prompt was chosen for past tasks; where it is set, rows with labels, in
            training mode, choose by distance * frequency (equation 4).
        known: how many tokens of a row stand before its answer, by the fingerprint of its ``input_ids``.
    """

    def __init__(self, model: PreTrainedModel, config: PromptTuningConfig, size: int, length: int, top_k: int):
        assert config.num_virtual_tokens == size * length
        super().__init__(model, config)
        self.size, self.length, self.top_k = size, length, top_k
        self.prompt_keys = nn.Embedding(size, model.config.get_text_config().hidden_size, device=model.device)
        # Only a key's direction counts; of a small one it can turn at usual learning rates.
        nn.init.normal_(self.prompt_keys.weight, std=0.02)
        self.frequency: Tensor | None = None
        self.known: dict[int, int] = {}
        self._chosen: dict[str, Tensor] = {}

    @property
    def virtual_tokens(self) -> int:
        return self.top_k * self.length

    def prompts(self, inputs: dict[str, Any]) -> Tensor:
        ids, mask, labels = (inputs.get(key) for key in ("input_ids", "attention_mask", "labels"))
        assert ids is not None, "a pool is asked by tokens, not by embeddings"
        mask = torch.ones_like(ids) if mask is None else mask
        labels = torch.full_like(ids, IGNORED) if labels is None else labels
        labelled = (labels != IGNORED).any(1)
        found = queries(self, ids, self._before_answer(ids, mask, labels, labelled))
        cosines = similarity(found, self.prompt_keys(torch.arange(self.size, device=ids.device)))
        frequency = None
        if self.training and self.frequency is not None:
            frequency = torch.where(labelled[:, None], self.frequency.to(cosines), 1.0)
        chosen = nearest(cosines, self.top_k, frequency)
        self._chosen = {"chosen": chosen, "key_similarity": cosines.gather(1, chosen)}
        tokens = chosen[:, :, None] * self.length + torch.arange(self.length, device=ids.device)
        return self.prompt_encoder[self.active_adapter](tokens.flatten(1))

    def remember(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """From now on know where the answers of these rows begin, though a forward pass may not say so.

        Args:
            rows: ``input_ids`` and, where an answer is among them, ``labels``.

        Returns:
            what was added to :attr:`known`.
        """
        found = {_fingerprint(row["input_ids"]): len(prompt(row)) for row in rows}
        self.known |= found
        return found

    @contextmanager
    def knowing(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Inside, :meth:`remember` these rows."""
        before = dict(self.known)
        self.remember(rows)
        try:
            yield
        finally:
            self.known = before

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write PEFT's files, in which the prompts stand one after the other, and the keys."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        keys = self.prompt_keys(torch.arange(self.size, device=self.prompt_keys.weight.device))
        if is_main_process:
            save_file({"keys": keys.detach().cpu().contiguous()}, Path(save_directory, KEYS))
            shape = {"size": self.size, "length": self.length, "top_k": self.top_k}
            write_json(Path(save_directory, POOL), shape)

    def load_adapter(self, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().load_adapter(model_id, *args, **kwargs)
        self.prompt_keys.load_state_dict({"weight": load_file(Path(model_id, KEYS))["keys"]})
        return result

    @classmethod
    def from_folder(cls, model: PreTrainedModel, folder: Path) -> PromptPoolModel:
        """A pretrained model with the pool that :meth:`save_pretrained` wrote."""
        shape = read_json(Path(folder, POOL))
        pool = cls(model, PromptTuningConfig.from_pretrained(str(folder)), **shape)
        pool.load_adapter(str(folder), pool.active_adapter)
        return pool

    def _before_answer(self, ids: Tensor, mask: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        """The tokens that the query may see, bool [rows, seq]."""
        seen = prompt_mask(mask, labels)
        if self.known and not labelled.all():
            tokens = mask.bool()
            rows = [row[own].tolist() for row, own in zip(ids, tokens, strict=True)]
            lengths = [self.known.get(_fingerprint(row), len(row)) for row in rows]
            told = tokens & (tokens.cumsum(1) <= torch.tensor(lengths, device=ids.device)[:, None])
            seen = torch.where(labelled[:, None], seen, told)
        return seen

    def _cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        outputs = super()._cut(module, args, kwargs, outputs)
        if self.training and not self._adapters_disabled:
            return with_tensors(outputs, **self._chosen)
        return outputs


def _fingerprint(ids: Sequence[int]) -> int:
    """64 bits that tell token sequences apart, the same on every machine."""
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
