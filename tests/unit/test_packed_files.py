"""Packed weights kept on disk: read back as they were, and never the cause of a failed start."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from safetensors.numpy import save_file
from torch.utils._pytree import tree_leaves

from precast.models.config import load_config
from precast.models.load import Weights, load_weights
from precast.models.precision import Precision
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.models.weights import content, loader, packed_files
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


def test_a_second_load_reads_what_the_first_packed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first = load(folder, None), load(folder, tmp_path / "kept")
    assert same(plain, first)
    [kept] = folders(tmp_path / "kept")

    def fail(*_: object) -> None:
        raise AssertionError("packed although it was kept")

    monkeypatch.setattr(loader, "pack_table", fail)  # all packing goes through it
    assert same(load(folder, tmp_path / "kept"), first)
    assert folders(tmp_path / "kept") == [kept]


class Killed(BaseException):
    """Nothing is tidied up behind it."""


def test_an_interrupted_start_leaves_what_it_has_packed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, packed = load(folder, None), list[int]()
    pack = loader.pack_table

    def counted(arena: Any, weight: torch.Tensor, fmt: Any) -> torch.Tensor:
        packed.append(weight.shape[0])
        return pack(arena, weight, fmt)

    monkeypatch.setattr(loader, "pack_table", counted)
    load(folder, tmp_path / "at once")
    at_once = len(packed)

    def killed(name: str, tensors: Any) -> None:
        if name == "layer-1":
            raise Killed
        keep(name, tensors)

    original = packed_files.keeping_packed

    @contextmanager
    def interrupted(path: Path) -> Any:
        nonlocal keep
        with original(path) as (begun, keep):
            yield begun, killed

    keep: Any = None
    monkeypatch.setattr("precast.models.load.keeping_packed", interrupted)
    with pytest.raises(Killed):
        load(folder, tmp_path)
    monkeypatch.setattr("precast.models.load.keeping_packed", original)
    packed.clear()
    assert same(load(folder, tmp_path), whole)
    assert 0 < len(packed) < at_once - 1, "the head and the first layer are there"
    packed.clear()
    assert same(load(folder, tmp_path), whole)
    assert packed == []


def test_two_that_pack_at_once_are_not_in_each_others_way(folder: Path, tmp_path: Path) -> None:
    with packed_files.keeping_packed(tmp_path / "tiny" / "one") as (_, keep):
        keep("head", {"a": torch.ones(3)})
        with packed_files.keeping_packed(tmp_path / "tiny" / "one") as (begun, keep_too):
            assert begun is None
            keep_too("head", {"a": torch.zeros(3)})
    read = packed_files.PackedFolder(tmp_path / "tiny" / "one").read("head")
    assert read["a"].tolist() == [0, 0, 0]
    assert list((tmp_path / "tiny" / ".tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["layer-0", "layer-1", "head"])
def test_flipped_bytes_are_noticed_and_packed_again(
    folder: Path, tmp_path: Path, name: str
) -> None:
    whole = load(folder, tmp_path)
    [kept] = folders(tmp_path)
    path = kept / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    for at in range(len(data) - 64, len(data)):
        data[at] ^= 0xFF
    path.write_bytes(data)
    with structlog.testing.capture_logs() as lines:
        assert same(load(folder, tmp_path), whole)
    [said] = [line for line in lines if line["log_level"] == "warning"]
    assert said["path"] == str(path)
    # What was damaged is written anew.
    assert same(load(folder, tmp_path), whole)
    with structlog.testing.capture_logs() as lines:
        assert same(load(folder, tmp_path), whole)
    assert not lines


def test_without_their_digests_files_are_not_trusted(folder: Path, tmp_path: Path) -> None:
    whole = load(folder, tmp_path)
    [kept] = folders(tmp_path)
    (kept / "digests.json").unlink()
    assert same(load(folder, tmp_path), whole)
    assert same(load(folder, tmp_path), whole)
    assert (kept / "digests.json").is_file()


def test_weights_of_the_same_size_and_date_are_other_weights(folder: Path, tmp_path: Path) -> None:
    """As rsync and ``cp -p`` leave them, and a build that sets all dates to the same."""
    path, day = folder / "model.safetensors", (1.7e9, 1.7e9)
    os.utime(path, day)
    load(folder, tmp_path)
    save_file(tensors(seed=1), tmp_path / "new.safetensors")
    os.utime(tmp_path / "new.safetensors", day)
    (tmp_path / "new.safetensors").replace(path)
    assert same(load(folder, tmp_path), load(folder, None))
    save_file(tensors(seed=2), path)  # in place
    os.utime(path, day)
    assert same(load(folder, tmp_path), load(folder, None))


def test_the_same_weights_by_another_date_are_not_packed_again(
    folder: Path, tmp_path: Path
) -> None:
    load(folder, tmp_path)
    os.utime(folder / "model.safetensors", (1.7e9, 1.7e9))
    load(folder, tmp_path)
    assert len(folders(tmp_path)) == 1


def test_digests_are_remembered_of_files_that_have_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache, read = tmp_path / "a.bin", tmp_path / "c" / "digests.json", list[Path]()
    path.write_bytes(b"one")

    def counted(file: Path) -> str:
        read.append(file)
        return file.read_text()

    monkeypatch.setattr(content, "file_digest", counted)
    assert [content.content_digests([path], cache) for _ in range(2)] == [["one"], ["one"]]
    assert len(read) == 2, "a file that was just written may be written again within a tick"
    monkeypatch.setattr(content, "SETTLED_NS", -1)
    assert [content.content_digests([path], cache) for _ in range(3)] == [["one"]] * 3
    assert len(read) == 3
    cache.write_text("{")
    assert content.content_digests([path], cache) == ["one"]
    path.write_bytes(b"two")
    assert content.content_digests([path], cache) == ["two"]


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
