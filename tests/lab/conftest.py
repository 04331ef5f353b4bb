"""Two small languages as token files, a tokenizer that knows both and their domain tokens, and a model of one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from holdfast.lab.tokenizer import train_tokenizer
from support.lab_runs import LANGUAGES, lab_config, language


@pytest.fixture(scope="session")
def languages(tmp_path_factory):
    """``tokenizer``, and the folders of token files ``north``, ``south``, ``north_valid``, ``south_valid``."""
    from holdfast.data.tokens.file import build_tokens

    folder = tmp_path_factory.mktemp("languages")
    texts = [text for name in LANGUAGES for text in language(name, 60, 0)]
    tokenizer = train_tokenizer(texts, 300, model_max_length=32, domains=list(LANGUAGES))
    made = SimpleNamespace(tokenizer=tokenizer, folder=folder)
    for name in LANGUAGES:
        for part, documents, seed in (("", 120, 1), ("_valid", 20, 2)):
            source = folder / f"{name}{part}.txt"
            source.write_text("\n".join(language(name, documents, seed)), encoding="utf-8")
            build_tokens([source], folder / f"{name}{part}", tokenizer, domain=name)
            setattr(made, name + part, folder / f"{name}{part}")
    return made


@pytest.fixture(scope="session")
def pretrained(languages, tmp_path_factory):
    """A laboratory run of 20 steps on the northern language, and its result."""
    from holdfast.lab.pretrain import pretrain
    from holdfast.system.progress import Progress

    folder = tmp_path_factory.mktemp("lab") / "north"
    result = pretrain(lab_config(languages, folder), Progress(quiet=True))
    return SimpleNamespace(path=folder, result=result)


@pytest.fixture
def cli(monkeypatch):
    """Runs a command in this process; its exit code."""
    from holdfast.cli import main

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["holdfast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    return run
