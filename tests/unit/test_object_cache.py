"""Compiled parts that captures share: whole, or not there, whatever others do meanwhile."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from precast.graphs.capture.object_cache import PartCache

KEY = "a" * 32


@pytest.fixture
def cache(tmp_path: Path) -> PartCache:
    return PartCache(folder=tmp_path / "parts")


def part(folder: Path, content: bytes) -> Path:
    path = folder / "made.so"
    path.write_bytes(content)
    return path


def test_the_newest_part_of_a_key_counts(cache: PartCache, tmp_path: Path) -> None:
    found = tmp_path / "found.so"
    assert not cache.get(KEY, found)
    for content in (b"first", b"second", b"second"):
        cache.put(KEY, part(tmp_path, content))
        assert cache.get(KEY, found)
        assert found.read_bytes() == content
    assert len(list(cache.folder.iterdir())) == 1


def test_other_bytes_are_no_part(cache: PartCache, tmp_path: Path) -> None:
    cache.put(KEY, part(tmp_path, b"first"))
    [entry] = cache.folder.iterdir()
    entry.write_bytes(b"other")
    assert not cache.get(KEY, tmp_path / "found.so")
    assert not entry.exists()


def test_a_part_that_goes_while_it_is_taken_is_not_there(
    cache: PartCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another capture has replaced it."""
    cache.put(KEY, part(tmp_path, b"first"))
    copy = shutil.copyfile

    def late(source: Path, target: Path) -> Any:
        source.unlink()
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", late)
    assert not cache.get(KEY, tmp_path / "found.so")


def test_a_part_is_there_while_it_is_put_again(
    cache: PartCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = part(tmp_path, b"first")
    cache.put(KEY, made)
    [entry] = cache.folder.iterdir()
    rename, there = Path.rename, []

    def watched(path: Path, target: Path) -> Path:
        there.append(entry.exists())
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    cache.put(KEY, made)
    assert there == [True]
