"""Tokenizer training: a byte-level BPE tokenizer from texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from holdfast.data.tokens.domains import DOMAIN, domain_token
from holdfast.errors import ConfigError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SMALLEST = 256 + len((BOS, EOS, PAD))  # every byte, and the special tokens


def require_new(folder: Path) -> None:
    """Raise a ConfigError if a file or a folder that is not empty would be replaced by a tokenizer."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; give a folder that does not, or delete it first")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 2048,
    *,
    domains: Sequence[str] = (),
    reserved: int = 0,
    model_max_length: int = 2048,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, and decodes to itself.

    The same texts in the same order give the same tokenizer. It puts ``<s>`` before every text; ``</s>`` is the token
    for the end of a text, which it never adds. Special tokens come first: 0 ``<s>``, 1 ``</s>``, 2 ``<pad>``, then
    those of the domains, ``<|NAME|>``, then ``<|reserved_0|>`` and so on.

    Args:
        texts: what the merges are learned from; read once, one at a time.
        vocab_size: tokens at most; there are fewer where the texts do not have enough pairs.
        domains: names of kinds of text; each gets a token.
        reserved: number of tokens for later use.
        model_max_length: context of the models that it is for, in tokens.

    Raises:
        ConfigError: vocab_size is smaller than the bytes and special tokens; a domain's name is not made of letters,
            digits and ``_.-``, is given twice, or is that of a reserved token.
    """
    count = 3 + len(domains) + reserved
    if vocab_size < 256 + count:
        raise ConfigError(
            f"vocab_size must be at least {256 + count} (256 bytes and {count} special tokens), not {vocab_size}"
        )
    later = [f"reserved_{number}" for number in range(reserved)]
    taken = set(later)
    for name in domains:
        if not DOMAIN.fullmatch(name):
            raise ConfigError(f"domain: {name!r} must be made of letters, digits, '_', '.' and '-'")
        if name in taken:
            raise ConfigError(f"domain: {name!r} is given twice, or is the name of a reserved token")
        taken.add(name)
    special = [BOS, EOS, PAD, *map(domain_token, [*domains, *later])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
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
