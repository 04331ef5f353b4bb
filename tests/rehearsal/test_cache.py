"""The teacher's cache: packing, moments, reuse, damage, killed builds, several processes, streaming and size."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from holdfast.engines.whole import model_fingerprint
from holdfast.errors import ConfigError, DataError
from holdfast.models.pretrained import tokenizer_fingerprint
from holdfast.rehearsal import cache as cache_module
from holdfast.rehearsal.cache import BuildPlan, TeacherCache, state_cache
from holdfast.rehearsal.states import RunningMoments, pack, unpack
from support.shown import recorded
from support.tiny import tiny_model, tiny_rows, tiny_tokenizer

KEY = {"model": "aa", "tokenizer": "bb", "samples": "cc", "layer": -1, "multiple": 1.0, "windows": (1, 2)}
ROWS = tiny_rows(10, seed=3)
HIDDEN = 6


def hidden_of(row: Any, width: int = HIDDEN) -> Tensor:
    """[tokens, width], which depends on the row alone; dimensions differ in mean and deviation."""
    ids = torch.tensor(row["input_ids"], dtype=torch.float32)[:, None]
    dimensions = torch.arange(1, width + 1)
    return torch.sin(ids * dimensions + torch.arange(len(ids))[:, None]) * dimensions + 10 * dimensions


def hidden_states(rows: Sequence[Any]) -> list[Tensor]:
    """Hidden states like a model's: views of one padded batch."""
    states = [hidden_of(row) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True, padding_value=math.nan)
    return [batch[: len(h)] for batch, h in zip(padded, states, strict=True)]


def never(rows: Sequence[Any]) -> list[Tensor]:
    raise AssertionError("the cache should have been reused")


SMALL = BuildPlan(shard_rows=3, batch_rows=2)


def build(
    folder: Path, key: dict[str, Any] = KEY, compute: Any = hidden_states, extras: Any = None, **plan: Any
) -> TeacherCache:
    return TeacherCache.open_or_build(folder, key, ROWS, compute, extras=extras, plan=replace(SMALL, **plan))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def together(world: int, work: Callable[[int, Callable[[], None]], Any]) -> list[Any]:
    """Let ``world`` threads stand for processes."""
    barrier, results, errors = threading.Barrier(world, timeout=30), [None] * world, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, barrier.wait)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


# --- packing ---


@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 5, 7, 8, 64])
def test_packing_is_undone_exactly(hidden: int) -> None:
    classes = torch.randint(0, 4, (2, 5, hidden), dtype=torch.uint8, generator=torch.Generator().manual_seed(hidden))
    packed = pack(classes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 5, math.ceil(hidden / 4))
    assert torch.equal(unpack(packed, hidden), classes)


def test_the_layout_of_a_packed_byte() -> None:
    assert pack(torch.tensor([2, 1, 0, 2, 1], dtype=torch.uint8)).tolist() == [0b10_00_01_10, 0b01]
    assert unpack(torch.tensor([[0b11_10_01_00]], dtype=torch.uint8), 4).tolist() == [[0, 1, 2, 3]]


# --- moments ---


def test_moments_are_those_of_all_vectors_however_they_come() -> None:
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(7) + torch.arange(7) ** 3
    whole, parts, merged = RunningMoments(), RunningMoments(), RunningMoments()
    whole.add(x)
    for part in x.split([1, 0, 99, 400]):
        parts.add(part)
        single = RunningMoments()
        single.add(part)
        merged.merge(single)
    for moments in (whole, parts, merged):
        assert moments.count == 500
        torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.std, x.double().std(0, correction=0), rtol=1e-10, atol=1e-12)


def test_a_small_spread_beside_a_large_mean_is_not_lost() -> None:
    x = 1e4 + 1e-2 * torch.randn(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = RunningMoments()
    for part in x.split(563):
        moments.add(part)
    torch.testing.assert_close(moments.std, x.std(0, correction=0), rtol=1e-7, atol=0)
    x32 = x.float()
    sums = (x32.square().mean(0) - x32.mean(0).square()).clamp(min=0).sqrt()
    assert ((sums / 1e-2 - 1).abs() > 0.5).all(), "sums of squares in float32 were good enough for this test"
    rounded = RunningMoments()
    for part in x32.split(563):
        rounded.add(part)
    torch.testing.assert_close(rounded.std, x32.double().std(0, correction=0), rtol=1e-7, atol=0)


# --- the store ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_was_computed_is_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    extras = {"head": torch.arange(12.0).view(3, 4).t(), "low": torch.ones(2, dtype=torch.float64)}
    build(tmp_path / "c", compute=lambda rows: [h.to(dtype) for h in hidden_states(rows)], extras=extras)
    cache = build(tmp_path / "c", compute=never)
    assert len(cache) == 10
    expected = [hidden_of(row).to(dtype) for row in ROWS]
    for sample in (9, 0, 4, 4):
        assert torch.equal(cache.read(sample), expected[sample])
    found = cache.read_many([7, 1, 7])
    assert all(torch.equal(t, expected[sample]) for t, sample in zip(found, [7, 1, 7], strict=True))
    assert all(torch.equal(cache.extra(name), value) for name, value in extras.items())
    assert cache.nbytes == sum(map(len, contents(tmp_path / "c").values()))


def test_a_changed_tensor_does_not_change_the_cache(tmp_path: Path) -> None:
    cache = build(tmp_path / "c")
    cache.read(0).zero_()
    assert torch.equal(cache.read(0), hidden_of(ROWS[0]))


def test_it_is_reused_when_everything_agrees_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "holdfast"):
        build(tmp_path / "c")
        assert caplog.messages == [f"teacher's cache {tmp_path / 'c'}: built, as there is none"]
        before = contents(tmp_path / "c")
        caplog.clear()
        build(tmp_path / "c", key=json.loads(json.dumps(KEY)), compute=never, shard_rows=5)
        assert f"teacher's cache {tmp_path / 'c'}: reused, 10 samples in {sum(map(len, before.values()))} bytes" in (
            caplog.messages
        )
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *((KEY | {name: "other"}, name) for name in KEY),
        (KEY | {"multiple": 1.5, "layer": 0}, "layer and multiple"),
        (KEY | {"kind": "states"}, "kind"),
        ({name: value for name, value in KEY.items() if name != "layer"}, "layer"),
    ],
)
def test_it_is_rebuilt_after_any_change_of_the_key_and_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: dict[str, Any], name: str
) -> None:
    build(tmp_path / "c", compute=lambda rows: [h + 1 for h in hidden_states(rows)], shard_rows=2)
    with caplog.at_level(logging.INFO, "holdfast"):
        cache = build(tmp_path / "c", key=key)
    assert caplog.messages == [f"teacher's cache {tmp_path / 'c'}: rebuilt, as it was made with another {name}"]
    assert all(torch.equal(cache.read(sample), hidden_of(row)) for sample, row in enumerate(ROWS))
    build(tmp_path / "fresh", key=key)
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


def test_it_is_rebuilt_for_another_number_of_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TeacherCache.open_or_build(tmp_path / "c", {"model": "aa"}, ROWS, hidden_states)
    with caplog.at_level(logging.INFO, "holdfast"):
        assert len(TeacherCache.open_or_build(tmp_path / "c", {"model": "aa"}, ROWS[:4], hidden_states)) == 4
    assert "with another samples" in caplog.text


def test_it_is_rebuilt_for_as_many_other_rows_under_the_same_key(tmp_path: Path) -> None:
    """The key may name the samples, as the methods' keys do; what counts is the rows themselves."""
    others = tiny_rows(len(ROWS), seed=4)
    TeacherCache.open_or_build(tmp_path / "c", KEY, others, hidden_states, plan=SMALL)
    cache = build(tmp_path / "c")
    assert all(torch.equal(cache.read(sample), hidden_of(row)) for sample, row in enumerate(ROWS))


def test_shards_of_a_killed_build_of_other_rows_are_not_taken(tmp_path: Path) -> None:
    others = tiny_rows(len(ROWS), seed=4)
    TeacherCache.open_or_build(tmp_path / "c", KEY, others, hidden_states, plan=SMALL)
    (tmp_path / "c" / "manifest.json").unlink()
    cache = build(tmp_path / "c")
    assert all(torch.equal(cache.read(sample), hidden_of(row)) for sample, row in enumerate(ROWS))


# --- damage ---


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00003.safetensors", "extras.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "gone", "first bit", "middle bit", "last bit"])
def test_damage_is_found_when_the_cache_is_opened_and_named(tmp_path: Path, name: str, damage: str) -> None:
    build(tmp_path / "c", extras={"head": torch.ones(5, 2)})
    path = tmp_path / "c" / name
    size = path.stat().st_size
    match damage:
        case "truncated":
            os.truncate(path, size - 1)
        case "longer":
            os.truncate(path, size + 1)
        case "gone":
            path.unlink()
        case "first bit":
            change(path, 0)
        case "middle bit":
            change(path, size // 2)
        case "last bit":
            change(path, -1)
    with pytest.raises(DataError, match=rf"{name}: is damaged \(.*\); delete the folder .*c to rebuild it") as error:
        build(tmp_path / "c", compute=never)
    assert ("SHA-256 differs" in str(error.value)) == damage.endswith("bit")


def test_damage_after_opening_is_found_on_request(tmp_path: Path) -> None:
    cache = build(tmp_path / "c")
    cache.verify()
    change(tmp_path / "c" / "shard-00001.safetensors", -1)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: is damaged"):
        cache.verify()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"format": 1, "samples": 10, "key": 3}', "\udcff"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    build(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"manifest\.json: is no manifest of a teacher's cache"):
        build(tmp_path / "c", compute=never)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be kept in"):
        build(tmp_path / "file" / "c")


# --- killed builds ---


def test_a_killed_build_leaves_no_cache_and_the_next_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: list[Any] = []

    def killed(rows: Sequence[Any]) -> list[Tensor]:
        if len(done) >= 7:
            raise KeyboardInterrupt
        done.extend(rows)
        return hidden_states(rows)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", compute=killed)
    assert sorted(contents(tmp_path / "c")) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    asked: list[Any] = []

    def counted(rows: Sequence[Any]) -> list[Tensor]:
        asked.extend(rows)
        return hidden_states(rows)

    with caplog.at_level(logging.INFO, "holdfast"):
        build(tmp_path / "c", compute=counted)
    assert asked == ROWS[6:]
    assert "goes on from 2 of 4 shards" in caplog.text
    build(tmp_path / "fresh")
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("changes", [{"key": KEY | {"model": "other"}}, {"shard_rows": 2}])
def test_what_a_killed_build_left_is_not_taken_for_another(tmp_path: Path, changes: dict[str, Any]) -> None:
    def killed(rows: Sequence[Any]) -> list[Tensor]:
        if rows[0] is ROWS[6]:
            raise KeyboardInterrupt
        return [h + 1 for h in hidden_states(rows)]

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", compute=killed)
    build(tmp_path / "c", **changes)
    build(tmp_path / "fresh", **changes)
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


def test_a_kill_while_an_old_cache_is_replaced_leaves_neither(tmp_path: Path) -> None:
    build(tmp_path / "c")

    def killed(rows: Sequence[Any]) -> list[Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", key=KEY | {"model": "other"}, compute=killed)
    assert contents(tmp_path / "c") == {}


@pytest.mark.parametrize("at", range(7))
def test_a_kill_between_writing_and_renaming_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Four shards, extras and the manifest are flushed in turn; the build dies at each, with half of the file there."""
    flushed = []

    def dying(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == at + 1:
            for path in (tmp_path / "c").glob("*.partial"):
                os.truncate(path, path.stat().st_size // 2)
            raise KeyboardInterrupt

    extras = {"head": torch.ones(2, 2)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "c", extras=extras)
    finished = at == 6  # the manifest is in place, but its folder was not flushed
    assert (tmp_path / "c" / "manifest.json").exists() == finished
    cache = build(tmp_path / "c", extras=extras, compute=never if at >= 4 else hidden_states)
    cache.verify()
    build(tmp_path / "fresh", extras=extras)
    found = contents(tmp_path / "c")
    assert {name: found[name] for name in contents(tmp_path / "fresh")} == contents(tmp_path / "fresh")
    assert all(torch.equal(cache.read(sample), hidden_of(row)) for sample, row in enumerate(ROWS))


# --- several processes ---


@pytest.mark.parametrize("world", [2, 3, 6])
def test_several_processes_write_the_same_bytes_as_one(tmp_path: Path, world: int) -> None:
    asked: dict[int, int] = dict.fromkeys(range(world), 0)

    def work(rank: int, barrier: Callable[[], None]) -> TeacherCache:
        def compute(rows: Sequence[Any]) -> list[Tensor]:
            asked[rank] += len(rows)
            return hidden_states(rows)

        extras = {"head": torch.ones(2)}
        return build(tmp_path / "c", compute=compute, extras=extras, rank=rank, world=world, barrier=barrier)

    build(tmp_path / "old", key=KEY | {"model": "other"}).folder.rename(tmp_path / "c")
    caches = together(world, work)
    build(tmp_path / "one", extras={"head": torch.ones(2)})
    assert contents(tmp_path / "c") == contents(tmp_path / "one")
    assert sum(asked.values()) == len(ROWS)
    assert sum(count > 0 for count in asked.values()) == min(world, 4)
    for cache in caches:
        assert all(torch.equal(cache.read(sample), hidden_of(row)) for sample, row in enumerate(ROWS))


def test_several_processes_build_the_same_states_as_one(tmp_path: Path) -> None:
    def work(rank: int, barrier: Callable[[], None]) -> Any:
        return states(tmp_path / "c", rank=rank, world=2, barrier=barrier)

    together(2, work)
    states(tmp_path / "one")
    assert contents(tmp_path / "c") == contents(tmp_path / "one")


# --- streaming ---


def test_at_most_one_shard_of_tensors_is_alive(tmp_path: Path) -> None:
    alive: set[int] = set()
    peak, sizes = 0, set()

    def tracked(tensor: Tensor) -> Tensor:
        nonlocal peak
        copy = original(tensor)
        alive.add(id(copy))
        weakref.finalize(copy, alive.discard, id(copy))
        peak = max(peak, len(alive))
        return copy

    def compute(rows: Sequence[Any]) -> list[Tensor]:
        sizes.add(len(rows))
        return hidden_states(rows)

    original = cache_module._copy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_copy", tracked)
        TeacherCache.open_or_build(tmp_path / "c", KEY, ROWS * 10, compute, plan=BuildPlan(shard_rows=6, batch_rows=4))
    assert sizes == {4, 2}
    assert peak <= 2 * 6
    assert not alive


def test_reading_a_sample_holds_its_bytes_only(tmp_path: Path) -> None:
    cache = build(tmp_path / "c", shard_rows=10)
    assert cache.read(3).untyped_storage().nbytes() == hidden_of(ROWS[3]).nbytes
    assert len(cache._open) == 1


# --- activation states ---


def states(folder: Path, multiple: float = 1.0, **plan: Any) -> tuple[TeacherCache, Tensor, Tensor]:
    return state_cache(folder, KEY, ROWS, hidden_states, multiple=multiple, plan=replace(SMALL, **plan))


@pytest.mark.parametrize("multiple", [0.5, 1.0, 1.3])
def test_states_and_thresholds_are_those_of_the_definition(tmp_path: Path, multiple: float) -> None:
    cache, low, high = states(tmp_path / "c", multiple=multiple)
    everything = torch.cat([hidden_of(row) for row in ROWS]).double()
    mean, std = everything.mean(0), everything.std(0, correction=0)
    torch.testing.assert_close(low.double(), mean - multiple * std, rtol=1e-6, atol=0)
    torch.testing.assert_close(high.double(), mean + multiple * std, rtol=1e-6, atol=0)
    assert low.dtype == high.dtype == torch.float32
    seen = set()
    for sample, row in enumerate(ROWS):
        expected = [
            [0 if h <= a else 2 if h >= b else 1 for h, a, b in zip(token, low.tolist(), high.tolist(), strict=True)]
            for token in hidden_of(row).tolist()
        ]
        packed = cache.read(sample)
        assert packed.shape == (len(row["input_ids"]), 2)
        assert unpack(packed, HIDDEN).tolist() == expected
        seen |= {state for token in expected for state in token}
    assert seen == {0, 1, 2}
    assert not (tmp_path / "c" / "hidden").exists()


def test_states_are_reused_and_rebuilt_with_another_multiple(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, low, high = states(tmp_path / "c")
    again, low_2, high_2 = state_cache(tmp_path / "c", KEY, ROWS, never)
    assert torch.equal(low, low_2)
    assert torch.equal(high, high_2)
    assert len(again) == len(ROWS)
    with caplog.at_level(logging.INFO, "holdfast"):
        _, lower, _ = states(tmp_path / "c", multiple=2.0)
    assert "rebuilt, as it was made with another multiple" in caplog.text
    assert (lower < low).all()


@pytest.mark.parametrize("calls", range(7))
def test_states_of_a_build_that_was_killed_anywhere(tmp_path: Path, calls: int) -> None:
    made = 0

    def killed(rows: Sequence[Any]) -> list[Tensor]:
        nonlocal made
        made += 1
        if made > calls:
            raise KeyboardInterrupt
        return hidden_states(rows)

    with pytest.raises(KeyboardInterrupt):
        state_cache(tmp_path / "c", KEY, ROWS, killed, plan=SMALL)
    assert not (tmp_path / "c" / "manifest.json").exists()
    states(tmp_path / "c")
    states(tmp_path / "fresh")
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")


def test_the_model_is_asked_once_about_each_sample_with_those_of_like_length(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def counted(rows: Sequence[Any]) -> list[Tensor]:
        asked.append([len(row["input_ids"]) for row in rows])
        return hidden_states(rows)

    state_cache(tmp_path / "c", KEY, ROWS, counted, plan=BuildPlan(shard_rows=len(ROWS), batch_rows=2))
    lengths = sorted((len(row["input_ids"]) for row in ROWS), reverse=True)
    assert [length for batch in asked for length in batch] == lengths


def test_what_is_asked_is_told_shard_by_shard_and_nothing_where_the_cache_is_there(tmp_path: Path) -> None:
    show, told = recorded()
    build(tmp_path / "c", show=show)
    shards = math.ceil(len(ROWS) / SMALL.shard_rows)
    assert told == [("the teacher reads its samples", done, shards) for done in range(1, shards + 1)]
    build(tmp_path / "c", compute=never, show=show)
    assert len(told) == shards


def test_bfloat16_states_are_compared_with_float32_thresholds(tmp_path: Path) -> None:
    def half(rows: Sequence[Any]) -> list[Tensor]:
        return [h.bfloat16() for h in hidden_states(rows)]

    cache, low, high = state_cache(tmp_path / "c", KEY, ROWS, half)
    h = hidden_of(ROWS[0]).bfloat16().float()
    assert torch.equal(unpack(cache.read(0), HIDDEN), (h > low).byte() + (h >= high).byte())


def test_hidden_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def broken(rows: Sequence[Any]) -> list[Tensor]:
        return [h.where(h != h.max(), math.inf) for h in hidden_states(rows)]

    with pytest.raises(DataError, match="not finite"):
        state_cache(tmp_path / "c", KEY, ROWS, broken)
    states(tmp_path / "c")


def test_states_take_at_most_a_fifteenth_of_float32(tmp_path: Path) -> None:
    rows = [{"input_ids": [n % 7 + 1] * 200, "labels": [1] * 200} for n in range(64)]
    key = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("model", "tokenizer", "samples")}
    cache, _, _ = state_cache(
        tmp_path / "c", key | {"layer": -1}, rows, lambda batch: [hidden_of(row, 256) for row in batch]
    )
    on_disk = sum(map(len, contents(tmp_path / "c").values()))
    assert on_disk <= 64 * 200 * 256 * 4 / 15
    assert cache.nbytes == on_disk


# --- fingerprints ---


def test_the_models_fingerprint_is_of_its_weights() -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model()) == before
    assert model_fingerprint(tiny_model(seed=1)) != before
    assert model_fingerprint(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})) != before
    assert model_fingerprint(tiny_model().bfloat16()) != before
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model_fingerprint(model) == before
    model.model.norm.weight.data[3] += 1e-6
    assert model_fingerprint(model) != before


def test_the_tokenizers_fingerprint_is_of_what_it_does() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.padding_side = "left"
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(tiny_tokenizer())
    begins = tiny_tokenizer()
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    larger = tiny_tokenizer()
    larger.add_tokens(["new"])
    assert len({before, tokenizer_fingerprint(begins), tokenizer_fingerprint(larger)}) == 3


def test_foreign_shards_without_a_mark_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    save_file({str(n): torch.zeros(1) for n in range(3)}, tmp_path / "c" / "shard-00000.safetensors")
    (tmp_path / "c" / "shard-00001.safetensors").write_text("no tensors")
    build(tmp_path / "c")
    build(tmp_path / "fresh")
    assert contents(tmp_path / "c") == contents(tmp_path / "fresh")
