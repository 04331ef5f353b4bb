"""Tiny sequence-to-sequence models with tokenizers laid out as the published ones; random weights, made from a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from support.tiny import VOCABULARY, tiny_config, tiny_tokenizer, write_tasks

EXTRA = 4
"""Sentinel tokens of the tiny T5; the published ones have 100."""


def t5_tokenizer() -> T5Tokenizer:
    """T5's own class and layout: 0 pad, 1 end, 2 unknown, SentencePiece pieces with their scores, sentinels at the end.

    There is no begin token; the end token stands after every text.
    """
    signs = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", *".,:?!+=-'"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((sign, -4.0) for sign in signs)]
    pieces += [(f"▁{word}", -5.0) for word in ("red", "green", "the")]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(EXTRA))]
    return T5Tokenizer(vocab=pieces, extra_ids=EXTRA, model_max_length=512)


def bart_tokenizer() -> PreTrainedTokenizerFast:
    """BART's layout: a begin and an end token around every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def seq2seq_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A T5 or BART of a few thousand random parameters, in eval mode; the encoder matters to every token."""
    torch.manual_seed(seed)
    if name == "bart":
        config: Any = BartConfig(
            **{
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "max_position_embeddings": 128,
                "init_std": 0.25,
                "dropout": 0.0,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
                "forced_bos_token_id": 1,
                "forced_eos_token_id": None,
            }
            | changes
        )
        model: Any = BartForConditionalGeneration(config)
        model.final_logits_bias.normal_(std=0.1)
    else:
        config = T5Config(
            **{
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_heads": 2,
                "n_positions": 128,
                "decoder_start_token_id": 0,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "initializer_factor": 3.0,
                "dropout_rate": 0.0,
            }
            | changes
        )
        model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


TOKENIZERS = {"t5": t5_tokenizer, "bart": bart_tokenizer}


def write_seq2seq(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A tiny model and its tokenizer as a folder that transformers loads."""
    seq2seq_model(name, seed, **changes).save_pretrained(folder)
    TOKENIZERS[name]().save_pretrained(folder)
    return folder


def seq2seq_config(folder: Path, name: str = "t5", **model: Any) -> dict[str, Any]:
    """A run of two short stages on a tiny model with these sizes, which is made if it is not there."""
    if not (folder / "model").exists():
        write_seq2seq(folder / "model", name, **model)
        write_tasks(folder / "tasks", ("red", "green"), train=16, test=4)
    return tiny_config(
        folder,
        stream={"path": str(folder / "tasks"), "order": ["red", "green"]},
        training={"epochs": 2, "batch_size": 8, "learning_rate": 3e-2, "log_every": 1, "save_every": 3},
        evaluation={"max_new_tokens": 3, "bootstrap": 0, "shift": 2},
    )
