"""A user's own collator of pictures: a method that would lose them says so, the others train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from holdfast import ContinualTrainer
from holdfast.errors import ConfigError
from support.sight import seeing_model
from support.tiny import pad_rows


class Seen:
    """Rows of tokens, some of which show a picture."""

    def __init__(self, token: int, shown: set[int]):
        self.token, self.shown = token, shown

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = [1, *[self.token] * (4 * (number in self.shown)), 5 + number, 3, 4]
        return {"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:], "shows": number in self.shown}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    batch = pad_rows([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    pictures = [torch.randn(3, 16, 16, generator=chance) for row in rows if row["shows"]]
    return {**batch, "pixel_values": torch.stack(pictures)} if pictures else batch


def trained(folder: Path, method: Any, shown: set[int]) -> Any:
    (folder / "general.txt").write_text("\n".join(f"the cat number {number} sat" for number in range(30)))
    model, processor = seeing_model()
    args = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        num_train_epochs=1,
    )
    trainer = ContinualTrainer(
        model=model,
        args=args,
        train_dataset=Seen(processor.tokenizer.convert_tokens_to_ids("<image>"), shown),
        data_collator=collate,
        processing_class=processor.tokenizer,
        method=method | ({"path": str(folder / "general.txt")} if method["name"].startswith("gere") else {}),
    )
    trainer.train()
    return trainer


LOSING = [{"name": "replay"}, {"name": "lwf"}, {"name": "ewc"}, {"name": "gere_ce", "way": "replace"}]


@pytest.mark.parametrize("method", LOSING, ids=lambda method: method["name"])
@pytest.mark.parametrize("shown", [set(range(8)), {5}], ids=["all", "one"])
def test_a_method_that_would_lose_the_pictures_is_refused(method, shown, tmp_path):
    with pytest.raises(ConfigError, match=f"method {method['name']}: train_dataset: its rows have pixel_values"):
        trained(tmp_path, method, shown)


@pytest.mark.parametrize("method", [{"name": "si"}, {"name": "eaft"}, {"name": "gere_ce"}], ids=lambda m: m["name"])
def test_a_method_that_keeps_no_row_trains_beside_pictures(method, tmp_path):
    trainer = trained(tmp_path, method, set(range(8)))
    assert trainer.state.global_step == trainer.state.max_steps > 0
