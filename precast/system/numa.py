"""Where memory lies on machines with several NUMA nodes.

A rank's threads are pinned, so the memory that they read at every step, weights and KV cache,
should lie on their cores' node, or be dealt over the nodes if a rank spans several. The kernel's
rule, the node of whoever touches a page first, does not give that: one thread packs all weights.
The system call alone is needed, no library.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from torch import Tensor

from precast.log import get_logger

log = get_logger(__name__)

NODES: Final = Path("/sys/devices/system/node")
_SYS_MBIND: Final = 237  # x86-64
_MPOL_PREFERRED: Final = 1
_MPOL_INTERLEAVE: Final = 3
_MASK_BITS: Final = 1024

_home: tuple[int, ...] = ()
"""Nodes of this process's compute threads; none where there is only one node, or no telling."""


def nodes_of(cores: Iterable[int], root: Path) -> tuple[int, ...]:
    """The nodes that ``cores`` are on, ascending; none for cores that the kernel lists nowhere."""
    nodes = {
        int(path.parent.name.removeprefix("node"))
        for core in cores
        for path in root.glob(f"node[0-9]*/cpu{core}")
    }
    return tuple(sorted(nodes))


def set_home(cores: Iterable[int]) -> None:
    """Memory that is placed from now on lies near ``cores``. Where there is one node, nothing needs
    to be placed."""
    global _home
    several = len(list(NODES.glob("node[0-9]*"))) > 1
    _home = nodes_of(cores, NODES) if several else ()


def place(memory: Tensor, nodes: tuple[int, ...] | None = None) -> None:
    """Has untouched pages of ``memory``'s storage come from ``nodes`` (default: where the compute
    threads are): from one, or in turn from several, and from others once these are full. Pages that
    hold something else too stay as they are. A container may forbid it: that is logged.
    """
    global _home
    chosen = _home if nodes is None else nodes
    storage, page = memory.untyped_storage(), mmap.PAGESIZE
    begin = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if not chosen or begin >= end:
        return
    number = _mbind(begin, end - begin, chosen)
    if number != 0:
        _home = ()  # say it once, not for each of a model's layers
        log.warning("memory is not placed by node", nodes=chosen, reason=os.strerror(number))


def _mbind(begin: int, size: int, nodes: tuple[int, ...]) -> int:
    """0 or an error number."""
    if max(nodes) >= _MASK_BITS:
        return errno.EINVAL
    mask = (ctypes.c_ulong * (_MASK_BITS // 64))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    mode = _MPOL_PREFERRED if len(nodes) == 1 else _MPOL_INTERLEAVE
    libc = ctypes.CDLL(None, use_errno=True)
    # One more than there are bits: the kernel takes the count less one.
    status = libc.syscall(
        ctypes.c_long(_SYS_MBIND),
        ctypes.c_void_p(begin),
        ctypes.c_ulong(size),
        ctypes.c_ulong(mode),
        mask,
        ctypes.c_ulong(_MASK_BITS + 1),
        ctypes.c_ulong(0),
    )
    return 0 if status == 0 else ctypes.get_errno()
