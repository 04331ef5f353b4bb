"""Soft prompts that a caller does not see: put before the embedded input inside the model, and cut off its outputs.

With PEFT's prompt tuning, a model returns more logits than it has input tokens, and in a batch that is padded on the
left the prompts lie farther from the text where there is more padding. Here ``logits[b, i]`` predicts token i + 1 of
row b of the batch as given, so that losses, evaluation and generation need not know about prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM, PromptTuningConfig
from peft.config import PromptLearningConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.api.rows import IGNORED, prompt
from holdfast.engines.pieces import full
from holdfast.errors import ConfigError
from holdfast.models.cache import cache_of
from holdfast.models.generation import evaluating
from holdfast.models.head import with_tensors
from holdfast.system.files import read_json, write_json
from holdfast.tuners.prompt_keys import batch_queries, before_answer, nearest, row_fingerprint, similarity

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


_PeftModel: Any = object
"""Any PEFT model: the class that stands behind."""


class SavedPrompts(_PeftModel):
    """Saves prompts, and the network that makes them (P-tuning's), so that training continues."""

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        encoder = self.prompt_encoder[self.active_adapter]
        with evaluating(encoder):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        weights = {key: full(w).detach() for key, w in encoder.state_dict(keep_vars=True).items()}
        if is_main_process and len(weights) > 1:  # a single one is the prompt itself, which PEFT has saved
            save_file({key: w.cpu().contiguous() for key, w in weights.items()}, Path(save_directory, ENCODER))

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        path = Path(model_id, ENCODER)
        if not path.exists():
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)
        saved = load_peft_weights(str(model_id), device="cpu")
        own: dict[str, Tensor] = {}
        for name, module in self.named_modules():  # modules_to_save
            if isinstance(module, AuxiliaryTrainingWrapper):
                names = module.adapter_state_dict_load_map(adapter_name)
                own |= {f"{name}.{loaded}": saved[f"{name}.{key}"] for key, loaded in names.items()}
        self.load_state_dict(own, strict=False)
        return self.prompt_encoder[adapter_name].load_state_dict(load_file(path))


class SoftPromptModel(SavedPrompts, PeftModelForCausalLM):
    """A causal language model with PEFT's prompt tuning (Lester et al., 2021, arXiv 2104.08691) or P-tuning.

    ``model(input_ids, attention_mask, labels)`` returns the loss, logits [rows, seq, vocab] and hidden states
    [rows, seq, hidden] of the input tokens alone; ``generate`` takes and returns tokens alone. Plain PEFT loads the
    saved prompts. If a network makes them (P-tuning's), its weights are saved too, so that training continues. The
    prompts stand before padding on the left; positions count from the first prompt on, without padding.
    """

    def __init__(
        self, model: PreTrainedModel, config: PromptLearningConfig, adapter_name: str = "default", **kwargs: Any
    ):
        super().__init__(model, config, adapter_name, **kwargs)
        self.base_model.register_forward_pre_hook(self._put, with_kwargs=True)
        self.base_model.register_forward_hook(self._cut, with_kwargs=True)

    @property
    def virtual_tokens(self) -> int:
        """The number of prompt embeddings before every row."""
        return self.active_peft_config.num_virtual_tokens

    def prompts(self, inputs: dict[str, Any]) -> Tensor:
        """The prompt embeddings of each row, [rows, virtual tokens, embedding], with gradient.

        Args:
            inputs: arguments of the forward pass: ``inputs_embeds`` [rows, seq, embedding], ``input_ids``,
                ``attention_mask`` and ``labels``, each [rows, seq] or None.
        """
        return self.get_prompt(batch_size=len(inputs["inputs_embeds"]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    def _put(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Insert the prompts before the base model's forward pass, unless the cache holds them already."""
        if self._adapters_disabled:
            return None
        parameters = inspect.signature(module.forward).parameters
        inputs = dict(zip(parameters, args, strict=False)) | kwargs
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        restarts = mask is None and positions is not None and bool((positions[:, 1:] == 0).any())
        if restarts or (mask is not None and mask.dim() != 2):
            raise ConfigError(
                "data.packing: a soft prompt stands before a row, so several rows cannot share a sequence; turn "
                "packing off"
            )
        cache = cache_of(inputs)
        if cache is not None and cache.get_seq_length():
            if mask is not None:
                inputs["attention_mask"] = nn.functional.pad(mask, (self.virtual_tokens, 0), value=1)
            if positions is not None:
                inputs["position_ids"] = positions + self.virtual_tokens
            return (), inputs

        if mask is not None and positions is None and "position_ids" in parameters:
            positions = (mask.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        self._insert(module, inputs, positions)
        return (), inputs

    def _insert(self, module: Any, inputs: dict[str, Any], positions: Tensor | None) -> None:
        """Insert the prompts into the inputs of a forward pass without a cache; ``positions`` are the tokens'."""
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
        if labels is not None:  # without prompts, nothing predicts a row's first token; so the prompts do not either
            inputs["labels"] = nn.functional.pad(labels[:, 1:], (virtual + 1, 0), value=IGNORED)
        if isinstance(inputs.get("logits_to_keep"), Tensor):
            inputs["logits_to_keep"] = inputs["logits_to_keep"] + virtual

    def _cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """Cut the outputs down to the row's own tokens, after the forward pass."""
        embeds = kwargs.get("inputs_embeds")
        if self._adapters_disabled or embeds is None:
            return outputs
        virtual = self.virtual_tokens
        tokens = embeds.shape[1] - virtual
        outputs["logits"] = outputs.logits[:, -tokens:]
        if outputs.get("hidden_states") is not None:
            outputs["hidden_states"] = tuple(states[:, -tokens:] for states in outputs.hidden_states)
        return outputs


class PromptPoolModel(SoftPromptModel):
    """A pool of soft prompts, of which the nearest to a row's prompt tokens are put before it.

    Wang et al., 2022, Learning to Prompt, arXiv 2112.08654, equations 2 and 3. Each soft prompt has a key. A row's
    query is the frozen model's mean last hidden state over the tokens before its answer. If the forward pass has
    labels, these are the tokens before the first supervised one; if not, those that :meth:`remember` or
    :meth:`remembering` was told of; else all tokens, as in generation.

    In training mode the outputs also have ``chosen``, int64 [rows, top_k], the prompts of each row, and
    ``key_similarity``, float32 [rows, top_k], the cosines of its query and their keys, with gradient to the keys.

    Attributes:
        prompt_keys: the keys, an embedding of [size, hidden].
        frequency: [size], how often each prompt was chosen for past tasks. If it is set, rows with labels choose by
            distance * frequency in training mode (equation 4).
        prompt_lengths: how many tokens of a row stand before its answer, by the fingerprint of its ``input_ids``.
    """

    def __init__(self, model: PreTrainedModel, config: PromptTuningConfig, size: int, length: int, top_k: int):
        assert config.num_virtual_tokens == size * length
        super().__init__(model, config)
        self.size, self.length, self.top_k = size, length, top_k
        self.prompt_keys = nn.Embedding(size, model.config.get_text_config().hidden_size, device=model.device)
        # Only a key's direction matters; a small key can change its direction at usual learning rates.
        nn.init.normal_(self.prompt_keys.weight, std=0.02)
        self.frequency: Tensor | None = None
        self.prompt_lengths: dict[int, int] = {}
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
        queries = batch_queries(self, ids, self._before_answer(ids, mask, labels))
        cosines = similarity(queries, self.prompt_keys(torch.arange(self.size, device=ids.device)))
        frequency = None
        if self.training and self.frequency is not None:
            frequency = torch.where(labelled[:, None], self.frequency.to(cosines), 1.0)
        chosen = nearest(cosines, self.top_k, frequency)
        self._chosen = {"chosen": chosen, "key_similarity": cosines.gather(1, chosen)}
        tokens = chosen[:, :, None] * self.length + torch.arange(self.length, device=ids.device)
        return self.prompt_encoder[self.active_adapter](tokens.flatten(1))

    def remember(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """Remember where the answers of these rows begin, for forward passes without labels.

        Args:
            rows: ``input_ids`` and, where they hold an answer, ``labels``.

        Returns:
            what was added to :attr:`prompt_lengths`.
        """
        lengths = {row_fingerprint(row["input_ids"]): len(prompt(row)) for row in rows}
        self.prompt_lengths |= lengths
        return lengths

    @contextmanager
    def remembering(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """:meth:`remember` these rows, and forget them at the end."""
        before = dict(self.prompt_lengths)
        self.remember(rows)
        try:
            yield
        finally:
            self.prompt_lengths = before

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write PEFT's files, with the prompts one after the other, and the keys."""
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

    def _before_answer(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """The tokens that the query may look at, bool [rows, seq]."""
        return before_answer(ids, mask, labels, self.prompt_lengths)

    def _cut(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        outputs = super()._cut(module, args, kwargs, outputs)
        if self.training and not self._adapters_disabled:
            return with_tensors(outputs, **self._chosen)
        return outputs
