"""Convert a SentencePiece tokenizer and its chat template to a fast tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import DataError
from holdfast.system.files import JsonError, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# --- tokenizer ---


def convert_tokenizer(source: Path, config: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer as a plain fast one, with its special tokens and its chat template."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    from holdfast.models.convert.sentencepiece import fast_tokenizer, read_model

    path = source / "tokenizer.model"
    model = read_model(path)
    settings = DEFAULTS | read_settings(source / "tokenizer_config.json")
    added = {
        int(i): AddedToken(**{key: value for key, value in token.items() if key != "__type"})
        for i, token in settings.get("added_tokens_decoder", {}).items()
    }
    for text, i in read_settings(source / "added_tokens.json").items():
        added.setdefault(i, AddedToken(text, normalized=False))
    roles = _roles(source, len(model.pieces))
    texts = {piece.text: i for i, piece in enumerate(model.pieces)} | {token.content: i for i, token in added.items()}
    named = {key: _content(settings[key]) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if named["pad_token"] not in texts:
        named["pad_token"] = None  # Baichuan-7B names one that its vocabulary does not have
    unknown = [f"{key} {text!r}" for key, text in named.items() if text is not None and text not in texts]
    if unknown:
        raise DataError(f"{source / 'tokenizer_config.json'}: no token of tokenizer.model: {', '.join(unknown)}")
    for special in [*named.values(), *map(_content, settings.get("additional_special_tokens") or [])]:
        if special in texts:
            added[texts[special]] = AddedToken(special, normalized=False, special=True)
    for i in roles.values():
        added.setdefault(i, AddedToken(model.pieces[i].text, normalized=False, special=True))
    tokenizer = fast_tokenizer(model, added, path)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.get_vocab_size()} tokens, and the model only {config['vocab_size']}"
        )
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        add_bos_token=settings["add_bos_token"],
        add_eos_token=settings["add_eos_token"],
        model_max_length=settings.get("model_max_length"),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    plain.chat_template = _chat_template(source, settings, {role: added[i].content for role, i in roles.items()})
    return plain


# For keys that tokenizer_config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "add_bos_token": True,
    "add_eos_token": False,
}


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _roles(source: Path, pieces: int) -> dict[str, int]:
    """The ids of the tokens before a turn in Baichuan 2's chat models, which generation_config.json holds, by role."""
    generation = read_settings(source / "generation_config.json")
    keys = {role: f"{role}_token_id" for role in ("user", "assistant")}
    if not all(key in generation for key in keys.values()):
        return {}
    ids = {role: int(generation[key]) for role, key in keys.items()}
    wrong = [f"{role}_token_id {i}" for role, i in ids.items() if not 0 <= i < pieces]
    if wrong:
        raise DataError(f"{source / 'generation_config.json'}: no token of tokenizer.model: {', '.join(wrong)}")
    return ids


def _chat_template(source: Path, settings: dict[str, Any], roles: dict[str, str]) -> str | None:
    """The checkpoint's own template, or a template equal to the code of Baichuan 2's build_chat_input.

    In that code a turn is its role's token and its content, a system text comes first without a token, and nothing
    separates turns. The end token closes the last answer only, as in Baichuan 2's fine-tuning code.
    """
    file = source / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    if settings.get("chat_template") or not roles:
        return settings.get("chat_template")
    user, assistant = (json.dumps(roles[role]) for role in ("user", "assistant"))
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' and loop.first -%}{{- message['content'] -}}"
        f"{{%- elif message['role'] == 'user' -%}}{{{{- {user} + message['content'] -}}}}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{- {assistant} + message['content'] -}}}}"
        "{%- if loop.last and not add_generation_prompt -%}{{- eos_token -}}{%- endif -%}"
        "{%- else -%}{{- raise_exception('roles are user and assistant, after a system text at most') -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt and (not messages or messages[-1]['role'] != 'assistant') -%}"
        f"{{{{- {assistant} -}}}}{{%- endif -%}}"
    )


# --- files ---


def read_settings(path: Path, required: bool = False) -> dict[str, Any]:
    """A JSON object; an empty one if the file is absent and not required."""
    if not path.exists() and not required:
        return {}
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: there is no such file; name a folder that holds a checkpoint") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (JsonError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value
