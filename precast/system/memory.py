"""Memory for packed weights and KV caches: contiguous, near the compute threads' cores, and on huge
pages where the kernel gives them.

A decode step reads every weight once, more pages than the TLB holds, and on a virtual machine each
miss is a walk through two tables. See docs/decisions.md for what huge pages gained.
"""

import math
import mmap
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
