"""Sampling and greedy answers with vLLM instead of transformers, where it is installed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.errors import ConfigError
from holdfast.models.generation import until
from holdfast.models.sampling import Samples
from holdfast.system.files import read_json

if TYPE_CHECKING:
    from holdfast.models.sampling import Sampler

ADAPTER = "adapter_config.json"
MORE_THAN_FACTORS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
)
"""Fields of PEFT's LoraConfig with which an adapter is more than two factors a layer, all scaled alike."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""

Responder = Callable[[Sequence[Sequence[int]], int, Sequence[int]], list[list[int]]]
"""Gives the new tokens of each prompt, chosen greedily, without the end token: called with the prompts, the longest
response, and the tokens that end one."""


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
    LLM, SamplingParams = _vllm("engine: vllm", "--engine transformers")
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


class Adapter(NamedTuple):
    """A LoRA that vLLM applies to the answers of a request.

    Attributes:
        folder: as PEFT saves it.
        number: from 1; vLLM takes adapters of one number for the same.
    """

    folder: Path
    number: int


Answers = Callable[[Sequence[Sequence[int]], int, Sequence[int], Adapter | None], list[list[int]]]
"""A :data:`Responder` that is also given the adapter; None: the model's own weights answer."""


def adapter_rank(folder: Path) -> int:
    """The rank for which vLLM must have room to apply an adapter that PEFT saved; 0: vLLM applies none like it.

    vLLM multiplies by the two factors of each layer, all scaled alike.
    """
    config = read_json(folder / ADAPTER)
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    adapted = config.get("target_modules")
    outside = not isinstance(adapted, list) or {"lm_head", "embed_tokens"} & {*adapted}
    if not plain or outside or any(config.get(key) for key in MORE_THAN_FACTORS):
        return 0
    return room_for(config["r"])


def room_for(rank: int) -> int:
    """The least rank that vLLM makes room for; 0: this one is too large."""
    return next((most for most in RANKS if most >= rank), 0)


@contextmanager
def vllm_answers(name: str, length: int, dtype: str, rank: int = 0, **options: Any) -> Iterator[Answers]:
    """Load a whole model into vLLM, and let go of it at the end. vLLM pads nothing and fills its batches by itself; up
    to float rounding its answers are those of :func:`~holdfast.models.generation.generate`.

    Args:
        name: folder or hub name of the model.
        length: tokens of a prompt and its response, at most.
        dtype: of the weights, such as float32.
        rank: of adapters, at most, as :func:`adapter_rank` gives it; 0: none will be given.
        options: further ones of vLLM's LLM.

    Raises:
        ConfigError: vLLM is not installed.
    """
    LLM, SamplingParams = _vllm("evaluation.engine: vllm", "engine: transformers")
    adapters = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1} if rank else {}
    options = options | adapters | _room()
    engine = LLM(model=name, max_model_len=length, dtype=dtype, skip_tokenizer_init=True, **options)

    def respond(
        prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Sequence[int], adapter: Adapter | None
    ) -> list[list[int]]:
        greedy = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=0.0,
            stop_token_ids=sorted(ends),
            ignore_eos=True,  # only stop_token_ids end a response
            detokenize=False,
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = engine.generate(inputs, greedy, use_tqdm=False, **_applied(adapter))
        return [until(list(ends), list(output.outputs[0].token_ids)) for output in outputs]

    try:
        yield respond
    finally:
        core = getattr(getattr(engine, "llm_engine", None), "engine_core", None)
        if core is not None and hasattr(core, "shutdown"):
            core.shutdown()  # it is a process of its own, which holds the memory


def _applied(adapter: Adapter | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    from vllm.lora.request import LoRARequest

    return {"lora_request": LoRARequest(f"stage-{adapter.number}", adapter.number, str(adapter.folder))}


def _vllm(what: str, instead: str) -> tuple[Any, Any]:
    """vLLM's LLM and SamplingParams."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ConfigError(
            f"{what} cannot be used here ({error}); install it (pip install vllm), or use {instead}"
        ) from None
    return LLM, SamplingParams


def _room() -> dict[str, Any]:
    """How much memory vLLM may take beside the model that trains there: of a GPU's for all that it holds, of the
    machine's for keys and values. On a CPU it compiles nothing, which takes minutes and saves seconds."""
    import psutil  # type: ignore[import-untyped]
    import torch

    if not torch.cuda.is_available():
        return {"enforce_eager": True, "kv_cache_memory_bytes": psutil.virtual_memory().available // 8}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(0.9 * free / total, 3)}


def _seed(seed: int | str, number: int) -> int:
    """A seed of 63 bits for one sample."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little") >> 1
