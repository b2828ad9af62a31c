"""Memory for packed weights and KV caches: contiguous, near the compute threads' cores, and on huge
pages where the kernel gives them.

A decode step reads every weight once, more pages than the TLB holds, and on a virtual machine each
miss is a walk through two tables. See docs/decisions.md for what huge pages gained.
"""

import math
import mmap
import os
from typing import Final

import torch
from torch import Tensor

from precast.system import numa

HUGE_PAGE: Final = 2 << 20
CHUNK: Final = 32 << 20
ALIGNMENT: Final = 64


class Arena:
    """Tensors copied one behind the other into large mappings. Freed with the last of its
    tensors."""

    def __init__(self) -> None:
        self._free: Tensor = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """uint8, on a cache line of its own."""
        nbytes = math.prod(shape)
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > self._free.numel():
            self._free = mapped_zeros(max(size, CHUNK))
        memory, self._free = self._free[:nbytes], self._free[size:]
        return memory.view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values, shape and dtype, in the arena's memory; contiguous."""
        return self.empty((tensor.nbytes,)).view(tensor.dtype).view(tensor.shape).copy_(tensor)


class MappedFile:
    """Parts of a file in memory, one behind the other, each beginning on a huge page. The file
    grows as it has to; what is in it is kept."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._end = 0

    def next(self, size: int) -> Tensor:
        """uint8 tensor of at least ``size`` bytes, the same ones whenever the same sizes are asked
        for in the same order. A page costs memory when it is first written."""
        rounded = max(1, -(-size // HUGE_PAGE)) * HUGE_PAGE
        begin, self._end = self._end, self._end + rounded
        if os.fstat(self._file).st_size < self._end:
            os.ftruncate(self._file, self._end)
        mapping = mmap.mmap(self._file, rounded, mmap.MAP_SHARED, offset=begin)
        mapping.madvise(mmap.MADV_HUGEPAGE)  # where the kernel has them for files in memory
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        numa.place(memory)
        return memory


def mapped_zeros(size: int) -> Tensor:
    """uint8 tensor of at least ``size`` bytes that begins on a huge page. A page costs memory when
    it is first written."""
    rounded = -(-size // HUGE_PAGE) * HUGE_PAGE
    # Private: shared memory, which is the default, gets no huge pages.
    mapping = mmap.mmap(-1, rounded + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)  # before the first touch, which decides
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    numa.place(memory)
    skip = -memory.data_ptr() % HUGE_PAGE
    return memory[skip : skip + rounded]
