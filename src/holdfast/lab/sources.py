"""What an experiment's runs read: a tokenizer and token files from texts, made once for all runs that share them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from holdfast.config.reading import validate
from holdfast.config.section import Named, Section
from holdfast.errors import ConfigError, did_you_mean
from holdfast.system.files import whole_folder, write_jsonl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Files = dict[str, Path]
"""Token files and whatever else runs read, by the ``$NAME`` that configurations use."""

LANGUAGES = ("eng", "spa")


class Source(Section):
    """The texts of one token file."""

    text: str = Field(description="file, folder or Hugging Face dataset")
    subset: str | None = Field(None, description="configuration name of the dataset")
    split: str | None = Field(None, description="split of the dataset")
    column: str = Field("text", description="where a row has its text")
    skip: int = Field(0, ge=0, description="documents left out at the start")
    documents: int | None = Field(None, ge=1, description="at most so many documents after those")
    domain: str | None = Field(None, description="the domain whose token begins every sequence")


class Data(Section):
    """A kind of data: its keys are options, and it makes token files that have names."""

    def names(self) -> tuple[str, ...]:
        """The names of its token files."""
        raise NotImplementedError

    def vocabulary(self) -> int:
        """Size of the vocabulary of the tokenizer that it makes."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What its token files depend on, apart from where they are."""
        return self.model_dump(mode="json")

    def prepare(self, folder: Path) -> Files:
        """Make the token files that do not exist yet, below a folder.

        Raises:
            UserError: a source cannot be read.
        """
        raise NotImplementedError

    def measures(self, model: Path, files: Files) -> dict[str, float]:
        """Measure the model that a run ends with, beside its losses."""
        return {}


class Texts(Data):
    """Any texts: a tokenizer trained on some of them, and a token file of each."""

    vocab_size: int = Field(4096, description="tokens")
    reserved: int = Field(0, ge=0, description="tokens for later use")
    learn: list[str] = Field(min_length=1, description="files whose texts the tokenizer learns from")
    learn_documents: int | None = Field(None, ge=1, description="documents of each of them that it learns from")
    files: dict[str, Source] = Field(min_length=1, description="token files by name")

    def names(self) -> tuple[str, ...]:
        return tuple(self.files)

    def vocabulary(self) -> int:
        return self.vocab_size

    def prepare(self, folder: Path) -> Files:
        from holdfast.data.tokens.file import build_tokens
        from holdfast.lab.tokenizer import train_tokenizer

        domains = list(dict.fromkeys(source.domain for source in self.files.values() if source.domain))
        tokenizer = _tokenizer(
            folder,
            lambda: train_tokenizer(self._texts(), self.vocab_size, domains=domains, reserved=self.reserved),
        )
        for name, source in self.files.items():
            build_tokens(
                [source.text],
                folder / name,
                tokenizer,
                domain=source.domain,
                column=source.column,
                subset=source.subset,
                split=source.split,
                skip=source.skip,
                documents=source.documents,
            )
        return {name: folder / name for name in self.files}

    def _texts(self) -> Iterator[str]:
        from holdfast.data.texts import read_texts

        for name in self.learn:
            source = self.files[name]
            texts = read_texts(source.text, column=source.column, subset=source.subset, split=source.split)
            yield from itertools.islice(texts, self.learn_documents)


class Languages(Data):
    """Two languages: novels in English and Spanish; where they are absent, two generated dialects."""

    novels: str = Field(
        "../shared/data/novels", description="folder of {eng,spa}_{train,valid}.jsonl; absent: two dialects"
    )
    vocab_size: int = Field(1024, description="tokens")

    def names(self) -> tuple[str, ...]:
        return (*LANGUAGES, *(f"{name}_valid" for name in LANGUAGES))

    def vocabulary(self) -> int:
        return self.vocab_size

    def identity(self) -> dict[str, Any]:
        novels = Path(self.novels)
        sizes = [(novels / f"{name}.jsonl").stat().st_size for name in _parts()] if novels.is_dir() else DIALECTS
        return {"vocab_size": self.vocab_size, "novels": sizes}

    def prepare(self, folder: Path) -> Files:
        texts = Path(self.novels)
        if not texts.is_dir():
            texts = folder / "texts"
            if not texts.exists():
                write_dialects(texts)
        files = {
            name.removesuffix("_train"): Source(text=str(texts / f"{name}.jsonl"), domain=name.partition("_")[0])
            for name in _parts()
        }
        return Texts(vocab_size=self.vocab_size, learn=list(LANGUAGES), files=files).prepare(folder)


class Arithmetic(Data):
    """The toy tasks: rows of a training and a test file of each."""

    digits: int = Field(2, ge=1, le=9, description="of the numbers")
    rows: int = Field(16_384, ge=1, description="rows of a task to train on")
    test_rows: int = Field(1024, ge=1, description="rows of a task to test on")

    def names(self) -> tuple[str, ...]:
        from holdfast.lab.arithmetic import TASKS

        return (*TASKS, *(f"{task}_valid" for task in TASKS))

    def vocabulary(self) -> int:
        from holdfast.lab.arithmetic import signs

        return len(signs())

    def prepare(self, folder: Path) -> Files:
        from holdfast.data.tokens.file import build_tokens
        from holdfast.lab import arithmetic

        tokenizer = _tokenizer(folder, arithmetic.arithmetic_tokenizer)
        for task in arithmetic.TASKS:
            for name, count, seed in ((task, self.rows, 0), (f"{task}_valid", self.test_rows, 1)):
                text = folder / "texts" / f"{name}.jsonl"
                if not text.exists():
                    write_jsonl(text, [{"text": row} for row in arithmetic.rows(task, self.digits, count, seed)])
                build_tokens([text], folder / name, tokenizer, domain=task)
        return {name: folder / name for name in self.names()}

    def measures(self, model: Path, files: Files) -> dict[str, float]:
        """``accuracy_TASK``: share of test rows whose answer greedy decoding gets right."""
        from holdfast.data.tokens.file import TokenFile
        from holdfast.lab import arithmetic
        from holdfast.models.weights import load_language_model

        network = load_language_model(model, key="model")
        right = {}
        for task in arithmetic.TASKS:
            rows = TokenFile.open(files[f"{task}_valid"]).rows(arithmetic.row_length(self.digits))
            ids = rows.batch(range(len(rows)))
            right[f"accuracy_{task}"] = arithmetic.exact_match(network, ids, self.digits)
        return right


class Chats(Data):
    """A small world for an instruction-tuned model: text and chats to make it of, multiple choice, and a domain."""

    vocab_size: int = Field(1024, description="tokens")
    size: int = Field(40, description="of chronicle's world")
    rows: int = Field(600, ge=1, description="rows of the new domain to train on")

    def names(self) -> tuple[str, ...]:
        return ("text", "general", "chats", "choices", "circuits")

    def vocabulary(self) -> int:
        return self.vocab_size

    def prepare(self, folder: Path) -> Files:
        from holdfast.data.tokens.file import build_tokens
        from holdfast.lab.chats import chat_tokenizer, write_chats

        texts = folder / "texts"
        if not texts.exists():
            write_chats(texts, self.size, 0, self.rows)
        tokenizer = _tokenizer(folder, lambda: chat_tokenizer(texts, self.vocab_size))
        build_tokens([texts / "text.jsonl"], folder / "text", tokenizer)
        return {
            "text": folder / "text",
            "general": texts / "text.jsonl",
            "chats": texts / "chats",
            "choices": texts / "choices.jsonl",
            "circuits": texts / "circuits",
        }

    def measures(self, model: Path, files: Files) -> dict[str, float]:
        """``chat_loss``: the loss on answers to held-out questions, in nats per token."""
        from holdfast.lab.chats import measure_chats

        return measure_chats(model, files["chats"])


class Verilog(Data):
    """What the paper fine-tunes an instruction-tuned model on, and its questions before and after; from the hub."""

    rows: int = Field(100_000, ge=1, description="programs to train on")
    test_rows: int = Field(2000, ge=1, description="programs to test on")
    documents: int = Field(50_000, ge=1, description="documents of general text")
    questions: int = Field(1000, ge=1, description="questions of each set with choices")

    def names(self) -> tuple[str, ...]:
        return ("verilog", "general", "mmlu", "arc", "commonsense")

    def prepare(self, folder: Path) -> Files:
        from holdfast.lab.verilog import write_verilog

        texts = folder / "texts"
        if not texts.exists():
            write_verilog(texts, self.rows, self.test_rows, self.documents, self.questions)
        questions = {name: texts / "choices" / f"{name}.jsonl" for name in ("mmlu", "arc", "commonsense")}
        return {"verilog": texts / "verilog", "general": texts / "general.jsonl"} | questions


KINDS: dict[str, type[Data]] = {
    "texts": Texts,
    "languages": Languages,
    "arithmetic": Arithmetic,
    "chats": Chats,
    "verilog": Verilog,
}


def data_of(named: Named, where: str) -> Data:
    """The data that a configuration names, with its options checked.

    Raises:
        ConfigError: no kind of data has this name, or an option is wrong.
    """
    if named.name not in KINDS:
        raise ConfigError(f"{where}: data.name: no kind of data is {named.name!r}{did_you_mean(named.name, KINDS)}")
    data: Data = validate(KINDS[named.name], named.options, f"{where}: data")
    return data


def digest(value: Any) -> str:
    """A hash of a JSON value, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _tokenizer(folder: Path, make: Any) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    path = folder / "tokenizer"
    if not path.exists():
        with whole_folder(path) as partial:
            make().save_pretrained(partial)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(path)
    return tokenizer


def _parts() -> list[str]:
    return [f"{language}_{part}" for language in LANGUAGES for part in ("train", "valid")]


DIALECTS = "dialects 1"  # to be changed with the generated text, so that no token file of older text is used
SYLLABLES = [onset + vowel for onset in "bdfgjklmnprstvxz" for vowel in ("a", "e", "i", "o", "u", "ay", "or", "un")]


def write_dialects(folder: Path, size: int = 600) -> None:
    """Write two generated languages, in files that are named like those of the novels.

    The first is chronicle's general text. The second is the text of another world, in which a fixed rule replaces each
    word with another: the same grammar, other words and other facts.
    """
    from holdfast.data.streams.chronicle.stream import chronicle, general_text

    says: tuple[Callable[[str], str], ...] = (str, dialect)
    with whole_folder(folder) as partial:
        for seed, (language, say) in enumerate(zip(LANGUAGES, says, strict=True)):
            train = general_text(size=size, seed=seed)
            valid = chronicle(size=size, seed=seed).general[1].texts
            for part, texts in (("train", train), ("valid", valid)):
                write_jsonl(partial / f"{language}_{part}.jsonl", [{"text": say(text)} for text in texts])


def dialect(text: str) -> str:
    """A text in the second dialect: an invented word replaces each word of letters, and capitals stay."""
    return " ".join(_word(word) for word in text.split(" "))


def _word(word: str) -> str:
    letters = word.rstrip(".,:?")
    if not letters.isalpha():
        return word
    number = int.from_bytes(hashlib.sha256(letters.lower().encode()).digest()[:4], "big")
    invented = "".join(SYLLABLES[number >> shift & 127] for shift in (0, 7, 14))
    return (invented.capitalize() if letters[0].isupper() else invented) + word[len(letters) :]
