"""Blocks of the layers that attend to a window: a sequence keeps those of its last tokens.

It gets them step by step, and gives up what lies behind the window once nothing can be computed
again that looks at it. They are published like others, and kept while there is room: a prompt that
begins alike can go on where the blocks of a window are there.
"""

from precast.models.windows import KEY_BLOCK, blocks_of_window, first_needed
from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.sequence import Sequence


class WindowBlocks(BlockPool):
    """A pool of blocks beside that of the layers which attend to everything; a sequence's are
    ``Sequence.window_blocks``, from its block ``Sequence.window_first`` on."""

    def __init__(
        self, total: int, block_size: int, window: int, *, key_block: int = KEY_BLOCK
    ) -> None:
        """``key_block``: attention reads keys from a multiple of it on."""
        super().__init__(total, block_size)
        self._window = window
        self._key_block = key_block

    @property
    def capacity(self) -> int | None:
        """Tokens that one sequence may have; None: any number."""
        if self.total >= blocks_of_window(self._window, self.block_size):
            return None
        return self.total * self.block_size

    def first(self, position: int) -> int:
        """The first block that is read for the token at ``position`` and those behind it."""
        return first_needed(position, self._window, self._key_block) // self.block_size

    def room(self, sequence: Sequence) -> int:
        """Tokens up to which the sequence has blocks."""
        held = sequence.window_first + len(sequence.window_blocks)
        return held * self.block_size

    def missing(self, sequence: Sequence, tokens: int) -> int:
        """Blocks that it lacks for its first ``tokens`` tokens; none or fewer: it has them."""
        held = sequence.window_first + len(sequence.window_blocks)
        return self.blocks_for(tokens) - held

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Gives it blocks for so many tokens, as far as there are any."""
        wanted = min(self.missing(sequence, tokens), self.free_blocks)
        if wanted > 0:
            sequence.window_blocks += self.allocate(wanted)

    def begin(self, sequence: Sequence, found: list[int]) -> None:
        """Gives a sequence that has computed nothing itself the published blocks before what it
        computes next."""
        for block in found:
            self.share(block)
        sequence.window_blocks = found
        sequence.window_first = self.first(sequence.computed)

    def trim(self, sequence: Sequence) -> None:
        """Takes back what nothing looks at that may still be computed."""
        first = self.first(sequence.written)
        if (behind := first - sequence.window_first) > 0:
            self.free(sequence.window_blocks[:behind])
            del sequence.window_blocks[:behind]
            sequence.window_first = first

    def release(self, sequence: Sequence) -> None:
        """Takes back all of them."""
        self.free(sequence.window_blocks)
        sequence.window_blocks, sequence.window_first = [], 0

    def publish_block(self, sequence: Sequence, index: int, key: bytes) -> None:
        """The sequence's block of that index, if it holds it, is computed and won't change."""
        at = index - sequence.window_first
        if at >= 0:
            self.publish(sequence.window_blocks[at], key)

    def adopt(self, sequence: Sequence, block: int) -> None:
        """Gives it a published block as the next one to be computed, in place of its own."""
        at = sequence.computed // self.block_size - sequence.window_first
        self.share(block)
        if at < len(sequence.window_blocks):
            self.free([sequence.window_blocks[at]])
        sequence.window_blocks[at : at + 1] = [block]

    def reach(self, keys: list[bytes]) -> int:
        """How many of a sequence's first blocks, by their keys, need not be computed: those of the
        window before what comes then are there."""
        in_a_row, longest = 0, 0
        for index, key in enumerate(keys, 1):
            in_a_row = in_a_row + 1 if self.find(key) is not None else 0
            if in_a_row >= index - self.first(index * self.block_size):
                longest = index
        return longest

    def found(self, keys: list[bytes]) -> list[int]:
        """The published blocks that a sequence needs behind blocks with these keys, which are
        there (``reach``)."""
        first = self.first(len(keys) * self.block_size)
        return [block for key in keys[first:] if (block := self.find(key)) is not None]
