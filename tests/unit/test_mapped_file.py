"""Files in memory whose contents outlive who has mapped them."""

import os
from collections.abc import Iterator

import pytest
import torch

from precast.models.kv_cache import LayerCache, fill_cache, new_cache, read_cache
from precast.ops import native
from precast.system.memory import HUGE_PAGE, MappedFile
from services.decode_worker.ranks.kv_memory import KvMemory


@pytest.fixture
def memory() -> Iterator[KvMemory]:
    memory = KvMemory(1)
    yield memory
    memory.close()


def test_the_same_parts_are_there_when_a_file_is_mapped_again(memory: KvMemory) -> None:
    [file] = memory.files
    first = MappedFile(file)
    parts = [first.next(size) for size in (1, HUGE_PAGE + 1, 3000)]
    for number, part in enumerate(parts, 1):
        assert part.count_nonzero() == 0
        part[-1] = number
    sizes = [part.numel() for part in parts]
    assert sizes == [HUGE_PAGE, 2 * HUGE_PAGE, HUGE_PAGE]
    del first, parts, part
    second = MappedFile(file)
    assert [int(second.next(size)[-1]) for size in (1, HUGE_PAGE + 1, 3000)] == [1, 2, 3]


def test_memory_is_used_where_it_is_written_and_free_when_it_is_cleared(memory: KvMemory) -> None:
    [file] = memory.files
    MappedFile(file).next(64 << 20)[5 << 20] = 1
    assert 0 < os.fstat(file).st_blocks * 512 <= HUGE_PAGE
    memory.clear()
    assert os.fstat(file).st_blocks == 0
    assert MappedFile(file).next(64 << 20)[5 << 20] == 0


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
def test_a_cache_is_what_the_one_before_it_was(memory: KvMemory, kv_dtype: str) -> None:
    def mapped() -> LayerCache:
        memory_of = MappedFile(memory.files[0]).next
        return new_cache(
            kv_dtype, blocks=3, kv_heads=2, block_size=16, head_dim=16, memory=memory_of
        )

    native.start_threads((-1, -1))
    tokens = torch.randn(3 * 16, 2, 16)
    cache = mapped()
    fill_cache(cache, tokens, -tokens)
    expected = [part.clone() for part in read_cache(cache)]
    del cache
    again = read_cache(mapped())
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
