"""Sampling with vLLM instead of transformers, where it is installed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.errors import ConfigError
from holdfast.models.sampling import Samples

if TYPE_CHECKING:
    from holdfast.models.sampling import Sampler

ADAPTER = "adapter_config.json"


def vllm_engine(name: str, length: int) -> Sampler:
    """A sampler that uses vLLM; its samples also depend on how vLLM fills its batches.

    Args:
        name: folder or hub name of a whole model.
        length: tokens of a prompt and its continuation, at most.

    Raises:
        ConfigError: vLLM is not installed, or the model is an adapter.
    """
    if Path(name, ADAPTER).exists():
        raise ConfigError(f"engine: vllm samples from whole models; `holdfast export --merge` makes one of {name!r}")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ConfigError(
            f"engine: vllm cannot be used here ({error}); install it (pip install vllm), or use --engine transformers"
        ) from None
    engine = LLM(model=name, max_model_len=length)

    def draw(
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        seed: int | str,
        numbers: Sequence[int],
        temperature: float = 1.0,
        stop_token_ids: Collection[int] = (),
        hidden: bool = False,
    ) -> Samples:
        assert not hidden, "vLLM keeps no hidden states"
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        settings = [
            SamplingParams(
                max_tokens=limit,
                temperature=temperature,
                seed=_seed(seed, number),
                stop_token_ids=sorted(stop_token_ids),
                ignore_eos=True,  # only stop_token_ids end a sample
                logprobs=0,  # those of the drawn tokens
                detokenize=False,
            )
            for limit, number in zip(limits, numbers, strict=True)
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = [output.outputs[0] for output in engine.generate(inputs, settings, use_tqdm=False)]
        return Samples([list(one.token_ids) for one in outputs], [one.cumulative_logprob for one in outputs], [])

    return draw


def _seed(seed: int | str, number: int) -> int:
    """A seed of 63 bits for one sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little") >> 1
