"""Tokenizer training: a byte-level BPE tokenizer from texts."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from holdfast.errors import ConfigError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SMALLEST = 256 + len((BOS, EOS, PAD))  # every byte, and the special tokens


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 2048, *, model_max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, and decodes to itself.

    The same texts in the same order give the same tokenizer. It puts ``<s>`` before every text; ``</s>`` ends a text,
    but is never added by itself.

    Args:
        texts: what the merges are learned from.
        vocab_size: tokens at most; fewer where the texts do not hold as many pairs.
        model_max_length: context in tokens of the models that it is for.

    Raises:
        ConfigError: vocab_size is smaller than the bytes and special tokens.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(f"vocab_size must be at least {SMALLEST} (256 bytes and 3 special tokens), not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
