"""Packed weights kept on disk: read back as they were, and never the cause of a failed start."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file
from torch.utils._pytree import tree_leaves

from precast.models.config import load_config
from precast.models.load import Weights, load_weights
from precast.models.precision import Precision
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.models.weights import packed_files
from tests.support.models import tensors, write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "models" / "tiny")


def load(
    folder: Path, root: Path | None, *, rank: int = 0, tp: int = 1, **precision: Any
) -> Weights:
    config = load_config(folder)
    part = shard(config, rank, tp)
    shape = shape_of(config, part, Precision(**{"quantization": "q4_1", **precision}))
    return load_weights(folder, config, part, shape, 32, root)


def same(a: Weights, b: Weights) -> bool:
    pairs = zip(
        tree_leaves((a.embed, a.layers, a.head)),
        tree_leaves((b.embed, b.layers, b.head)),
        strict=True,
    )
    return all(torch.equal(x, y) for x, y in pairs)


def folders(root: Path) -> list[Path]:
    return sorted(p for p in (root / "tiny").iterdir() if p.name != ".tmp")


def test_a_second_load_reads_what_the_first_packed(folder: Path, tmp_path: Path) -> None:
    plain, first = load(folder, None), load(folder, tmp_path / "kept")
    assert same(plain, first)
    # Another value on disk shows that it is read and not packed again.
    [kept] = folders(tmp_path / "kept")
    packed = packed_files.read_packed(kept, "layer-0")
    name = next(iter(packed))
    changed = {**packed, name: torch.zeros_like(packed[name])}
    packed_files.save_file(changed, kept / "layer-0.safetensors")
    second = load(folder, tmp_path / "kept")
    assert not same(first, second)
    assert folders(tmp_path / "kept") == [kept]


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": "int8"},
        {"head_quantization": "q8_0"},
        {"weight_dtype": "bf16"},
        {"rank": 1, "tp": 2},
    ],
)
def test_other_formats_and_shards_have_folders_of_their_own(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    load(folder, tmp_path)
    assert same(load(folder, tmp_path, **change), load(folder, None, **change))
    assert len(folders(tmp_path)) == 2


def test_a_changed_checkpoint_is_packed_again(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path)
    save_file(tensors(seed=1), folder / "model.safetensors")
    assert same(load(folder, tmp_path), load(folder, None))
    assert len(folders(tmp_path)) == 2


def test_damaged_and_missing_files_are_packed_again(folder: Path, tmp_path: Path) -> None:
    whole = load(folder, tmp_path)
    [kept] = folders(tmp_path)
    (kept / "layer-0.safetensors").write_bytes(b"no safetensors")
    (kept / "head.safetensors").unlink()
    assert same(load(folder, tmp_path), whole)


def test_a_place_that_can_not_be_written_costs_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where the folder should be")
    assert same(load(folder, tmp_path / "kept"), load(folder, None))


def test_only_so_many_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "MAX_KEPT", 2)
    load(folder, tmp_path, quantization="int8")
    [oldest] = folders(tmp_path)
    os.utime(oldest, (0, 0))
    load(folder, tmp_path, quantization="q8_0")
    load(folder, tmp_path, quantization="q4_0")
    assert len(folders(tmp_path)) == 2
    assert oldest not in folders(tmp_path)


def test_a_tied_head_and_its_table_are_one_tensor(folder: Path) -> None:
    weights = load(folder, None)
    assert weights.head.vocab[0] is weights.embed.table
