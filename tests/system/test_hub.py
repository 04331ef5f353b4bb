"""The hub out of reach: one question, and no waiting for the retries of its library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from holdfast.config.model import ModelConfig
from holdfast.errors import ConfigError, DataError
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.system.hub import find_hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the hub was asked, without a network."""
    questions: list[Any] = []

    class Session:
        def head(self, url: str, **options: Any) -> None:
            questions.append(url)
            raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    find_hub.cache_clear()
    yield questions
    find_hub.cache_clear()


def test_a_name_that_is_no_folder_is_told_at_once(asked: list[Any]) -> None:
    out_of_reach = f"the hub {constants.ENDPOINT} cannot be reached: no network"
    with pytest.raises(ConfigError, match=f"there is no such folder, looked from .*; {out_of_reach}"):
        load_model_config(ModelConfig(name="no-such-model"))
    with pytest.raises(ConfigError, match=f"is no folder, and no tokenizer of the hub; {out_of_reach}"):
        load_tokenizer(ModelConfig(name="no-such-model"))
    assert asked == [constants.ENDPOINT] and constants.HF_HUB_OFFLINE


def test_a_folder_asks_nobody(asked: list[Any], tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be used as a model: "):
        load_model_config(ModelConfig(name=str(tmp_path)))
    assert not asked


def test_a_dataset_that_is_not_there_is_told_at_once(asked: list[Any]) -> None:
    from holdfast.data.texts import read_texts

    with pytest.raises(DataError, match=r"no-such-texts.* cannot be read: .*cannot be reached: no network"):
        list(read_texts("no-such-texts"))
    assert len(asked) == 1
