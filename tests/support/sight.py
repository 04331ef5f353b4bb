"""Tiny vision-language models of the families that are tested, with the families' own processors; random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image

from support.tiny import tiny_config, tiny_tokenizer

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.25,
}
# A question's parts in order, as most families' templates write them; %s: how a picture is written.
CHAT = """{%% for message in messages %%}{{ '[' + message.role + ']' }}{%% if message.content is string %%}\
{{ message.content }}{%% else %%}{%% for part in message.content %%}{%% if part.type == 'image' %%}{{ '%s' }}\
{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%}{%% endif %%}{{ '</s>' }}{%% endfor %%}\
{%% if add_generation_prompt %%}{{ '[assistant]' }}{%% endif %%}"""


def sign_tokenizer(*special: str, **named: str) -> Any:
    """Characters as tokens, brackets included, and the special tokens of a family."""
    made = tiny_tokenizer("[", "]", model_max_length=512, extra_special_tokens=named)
    made.add_tokens([hf.AddedToken(token, special=True, normalized=False) for token in special])
    return made


class _NoVideo:
    """Makes a processor whose part for videos is missing, as it is without torchvision."""

    def __new__(cls, kind: type, *parts: Any, **options: Any) -> Any:
        unchecked = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, *_: None})
        made = unchecked(*parts, **options)
        names = [name for name in kind.get_attributes() if name != "video_processor"]  # that are saved
        unchecked.get_attributes = classmethod(lambda cls: names)
        return made


def llava() -> tuple[Any, Any]:
    """LLaVA 1.5: CLIP, of which all patches but the first token become tokens."""
    tokenizer = sign_tokenizer("<image>")
    tokenizer.chat_template = CHAT % "<image>"
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = hf.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=16),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    """LLaVA-OneVision: SigLIP over tiles whose number follows the picture's shape; several pictures are not tiled."""
    tokenizer = sign_tokenizer("<image>", "<video>")
    tokenizer.chat_template = CHAT % "<image>"
    grid = [[16, 16], [16, 32], [32, 16], [32, 32]]
    images = hf.LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=grid)
    processor = _NoVideo(
        hf.LlavaOnevisionProcessor, images, tokenizer, None, num_image_tokens=4, vision_feature_select_strategy="full"
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **{key: VISION[key] for key in VISION if key != "initializer_range"}, image_size=16, patch_size=8
        ),
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=grid,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen_parts() -> tuple[Any, Any]:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = sign_tokenizer(*marks, image_token="<|image_pad|>", video_token="<|video_pad|>")
    tokenizer.chat_template = CHAT % "<|vision_start|><|image_pad|><|vision_end|>"
    ids = {
        key: tokenizer.convert_tokens_to_ids(mark)
        for key, mark in zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), marks, strict=True
        )
    }
    return tokenizer, ids


def qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL: patches of any picture's own shape, positions in three dimensions."""
    tokenizer, ids = _qwen_parts()
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    processor = _NoVideo(hf.Qwen2_5_VLProcessor, images, tokenizer, None)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT}
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        tie_word_embeddings=True,
        **ids,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    """Qwen3-VL: features of several depths of the tower go into the first blocks."""
    tokenizer, ids = _qwen_parts()
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    processor = _NoVideo(hf.Qwen3VLProcessor, images, tokenizer, None)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"vocab_size": len(tokenizer), "rope_parameters": rope, "head_dim": 8, **TEXT}
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    config = hf.Qwen3VLConfig(
        text_config=text,
        vision_config=vision | {"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        tie_word_embeddings=True,
        **ids,
    )
    return hf.Qwen3VLForConditionalGeneration(config), processor


def _idefics_tokenizer() -> Any:
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)]
    tokenizer = sign_tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *rows)
    tokenizer.chat_template = CHAT % "<image>"
    return tokenizer


def _idefics_config(kind: Any, tokenizer: Any) -> Any:
    return kind(
        vision_config={**VISION, "image_size": 16, "patch_size": 8},
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def idefics3() -> tuple[Any, Any]:
    """Idefics3: rows and columns of tiles, each between tokens that say which it is."""
    tokenizer = _idefics_tokenizer()
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=1)
    return hf.Idefics3ForConditionalGeneration(_idefics_config(hf.Idefics3Config, tokenizer)), processor


def smolvlm() -> tuple[Any, Any]:
    """SmolVLM, of Idefics3's kind."""
    tokenizer = _idefics_tokenizer()
    images = hf.SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = _NoVideo(hf.SmolVLMProcessor, images, tokenizer, None, image_seq_len=1)
    return hf.SmolVLMForConditionalGeneration(_idefics_config(hf.SmolVLMConfig, tokenizer)), processor


def internvl() -> tuple[Any, Any]:
    """InternVL in transformers' own form: tiles and a thumbnail."""
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = sign_tokenizer(*marks.values(), **marks)
    tokenizer.chat_template = CHAT % "<IMG_CONTEXT>\\n"
    images = hf.GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = _NoVideo(hf.InternVLProcessor, images, tokenizer, None, image_seq_length=1)
    vision = {**VISION, "image_size": [16, 16], "patch_size": [8, 8], "attention_bias": True}
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        vision_feature_layer=-1,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: a fixed number of tokens a picture, which see each other, between line breaks."""
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = sign_tokenizer(*marks.values(), **marks)
    tokenizer.chat_template = CHAT % "<start_of_image>"
    images = hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = hf.Gemma3Processor(images, tokenizer, image_seq_length=4)
    config = hf.Gemma3Config(
        vision_config={
            **{key: VISION[key] for key in VISION if key != "initializer_range"},
            "image_size": 16,
            "patch_size": 4,
        },
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        initializer_range=0.25,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


SEEING = {
    made.__name__: made for made in (llava, llava_onevision, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, internvl, gemma3)
}
"""The families that are tested, by name."""


def seeing_model(name: str = "llava", seed: int = 0) -> tuple[Any, Any]:
    """A model in eval mode, every weight of which matters, and its processor."""
    torch.manual_seed(seed)
    model, processor = SEEING[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval(), processor


def write_seeing(folder: Path, name: str = "llava", seed: int = 0) -> Path:
    """A tiny model and its processor as a folder that transformers loads."""
    model, processor = seeing_model(name, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Small pictures of noise, of several sizes; the brighter half of them has an even number."""
    chance = np.random.default_rng(seed)
    names = []
    for number in range(count):
        height, width = chance.integers(12, 40, 2)
        low = 128 if number % 2 == 0 else 0
        pixels = chance.integers(low, low + 128, (height, width, 3), dtype=np.uint8)
        names.append(f"{seed}-{number}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def write_seen_tasks(folder: Path, names: Sequence[str] = ("red", "green"), train: int = 16, test: int = 4) -> Path:
    """Tasks whose answer is a letter of the task's name, the first of bright pictures and the last of dark ones."""
    for seed, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        files = write_pictures(folder / name, train + test, seed)
        rows = [
            {"image": file, "prompt": f"{name}?", "answer": name[0] if number % 2 == 0 else name[-1]}
            for number, file in enumerate(files)
        ]
        for split, part in (("train", rows[:train]), ("test", rows[train:])):
            (folder / name / f"{split}.json").write_text(json.dumps(part), encoding="utf-8")
    return folder


def seeing_config(folder: Path, name: str = "llava", **changes: Any) -> dict[str, Any]:
    """A run of two short stages on a tiny model that sees, which is made if it is not there."""
    if not (folder / "model").exists():
        write_seeing(folder / "model", name)
        write_seen_tasks(folder / "tasks")
    return tiny_config(
        folder,
        **{
            "stream": {"path": str(folder / "tasks"), "order": ["red", "green"]},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "log_every": 1, "save_every": 3},
            "evaluation": {"max_new_tokens": 3, "bootstrap": 0, "shift": 2},
        }
        | changes,
    )
