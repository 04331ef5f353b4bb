"""A small vision-language model, untrained: transformers' LLaVA with a processor and a tokenizer of whole words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from holdfast.data.streams.gallery.drawing import CELL, SIDE
from holdfast.system.files import whole_folder

SPECIAL = PAD, UNKNOWN, BEGIN, END, IMAGE = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
CHAT = """{{ '<s>' }}{% for message in messages %}{% if message.content is string %}\
{{ message.content }}{% else %}{% for part in message.content %}\
{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}\
{{ '</s>' if message.role == 'assistant' }}{% endfor %}"""
"""Roles have no tokens of their own, so that the answer follows the question's last word."""

WORDS = r"\d+\?|\w+|[^\w\s]+"
"""What is a token. A number takes the question mark after it: a question that ends with a room's number then has the
room in the token from which the answer is predicted, and so small a model finds much sooner that the room matters."""

CONTEXT = 48
TEXT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3}
INITIAL = 0.06
"""Standard deviation of the language model's first weights; transformers' 0.02 is that of models ten times as wide."""
MEAN, SPREAD = 0.88, 0.24
"""By which pixels are normalised: about those of gallery, whose light ground would else outshine what stands on it."""


def make_seeing_model(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Write an untrained model that sees gallery's pictures, 0.8 million parameters, one patch a place, as a folder.

    Args:
        folder: gets the model, its processor and its tokenizer, as transformers loads them.
        texts: all words that they hold are tokens; others are unknown.
        seed: of the weights.

    Raises:
        UserError: the folder cannot be written.
    """
    tokenizer = _tokenizer(texts)
    processor = LlavaProcessor(
        SiglipImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_mean=[MEAN] * 3, image_std=[SPREAD] * 3, do_resize=False
        ),
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=CELL, vision_use_head=False),
        text_config=LlamaConfig(
            **TEXT,
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            initializer_range=INITIAL,
            tie_word_embeddings=True,
            **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in NAMED.items()},
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // CELL) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for weight in model.model.multi_modal_projector.parameters():
            if weight.dim() > 1:  # as wide as its input is, so that pictures weigh as much as words from the first step
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


NAMED = {"pad": PAD, "bos": BEGIN, "eos": END}


def _tokenizer(texts: Iterable[str]) -> Any:
    """A tokenizer of whole words and punctuation, in alphabetical order after the special tokens."""
    words = sorted({word for text in texts for word in re.findall(WORDS, text)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in NAMED.items()},
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        chat_template=CHAT,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
