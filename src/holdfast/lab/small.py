"""A small Llama from texts in memory, in one call: what the demo starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from holdfast.errors import ConfigError, DataError
from holdfast.system.files import whole_folder


def pretrain_small(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    context: int = 64,
    steps: int = 800,
    batch_size: int = 8,
    learning_rate: float = 4e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> Path:
    """Train a Llama from scratch and save it with its tokenizer, for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Texts are joined end to end and cut into blocks of ``context`` tokens. AdamW; the learning rate rises over a tenth
    of the steps and falls as a cosine; gradients are clipped to norm 1. The same arguments give the same weights on
    one machine.

    Args:
        texts: documents, shuffled or not: blocks are drawn in an order that the seed decides.
        tokenizer: with an end-of-sequence token, which is put after every text.
        directory: the folder to write; what stands there is replaced, at the end and as a whole.
        hidden: width of the residual stream; the feed-forward layers are three times as wide. Embeddings are tied.
        layers: decoder layers.
        heads: attention heads.
        context: tokens that the model sees at once, in training and later.
        steps: optimizer steps.
        batch_size: blocks in one step.
        learning_rate: its peak.
        weight_decay: of AdamW, decoupled; on matrices only.
        seed: of the initial weights and of the order.
        on_step: told (steps done, steps) after every step.

    Returns:
        The folder.

    Raises:
        ConfigError: hidden is no multiple of twice the heads, there are no steps, or the tokenizer has no
            end-of-sequence token.
        DataError: the texts do not fill one block.
    """
    if hidden % (2 * heads):
        raise ConfigError(f"hidden must be a multiple of twice the heads ({2 * heads}), not {hidden}")
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer must have an end-of-sequence token (eos_token)")
    blocks = pack(texts, tokenizer, context)
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with whole_folder(Path(directory)) as folder:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            max_grad_norm=1.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
            callbacks=[_OnStep(on_step)] if on_step else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(folder))
        tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").unlink()
    return Path(directory)


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, context: int) -> torch.Tensor:
    """Join the texts, each with the end-of-sequence token after it, and cut them into blocks.

    Returns:
        Token ids ``[blocks, context]``, int64; tokens that do not fill a last block are left out.

    Raises:
        DataError: the texts do not fill one block.
    """
    ids = [token for row in tokenizer(list(texts))["input_ids"] for token in (*row, tokenizer.eos_token_id)]
    count = len(ids) // context
    if count == 0:
        raise DataError(f"the texts hold {len(ids)} tokens; one block is {context}")
    return torch.tensor(ids[: count * context]).view(count, context)


class _OnStep(TrainerCallback):
    def __init__(self, tell: Callable[[int, int], None]):
        self._tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state.global_step, state.max_steps)
