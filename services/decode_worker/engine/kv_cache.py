"""Blocks of the paged KV cache: who holds them, and what those are good for that nobody holds.

A block that is full and computed may be published under a key of its contents. It is then shared by
all whose prompts begin alike, and is kept when nobody holds it, until the room is needed: the one
that was not held for longest goes first, and of a prompt its end.
"""

from collections import OrderedDict


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for."""


class BlockPool:
    """Block ids 0 to ``total`` - 1; every operation takes constant time a block."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._published: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Published blocks that nobody holds, those first that go first."""

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Blocks for one holder. Raises OutOfBlocks, and takes nothing, if too few are free."""
        if count > self.free_blocks:
            raise OutOfBlocks(f"{count} blocks wanted, {self.free_blocks} free")
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def free(self, blocks: list[int]) -> None:
        """One holder gives up a sequence's blocks, in their order there."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._free.append(block)

    def find(self, key: bytes) -> int | None:
        """The block that was published under this key."""
        return self._published.get(key)

    def is_held(self, block: int) -> bool:
        return self._holders[block] > 0

    def share(self, block: int) -> None:
        """One more holds a published block."""
        self._holders[block] += 1
        self._kept.pop(block, None)

    def publish(self, block: int, key: bytes) -> None:
        """A held block is computed and won't change."""
        if key not in self._published and block not in self._key_of:
            self._published[key] = block
            self._key_of[block] = key

    def lose(self) -> None:
        """The contents of all blocks, which nobody holds, are gone."""
        assert self.free_blocks == self.total, "blocks are held"
        self._free += self._kept
        self._kept.clear()
        self._published.clear()
        self._key_of.clear()

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._published[self._key_of.pop(block)]
        return block
