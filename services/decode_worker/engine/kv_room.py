"""What sequences hold of the KV cache: blocks of the layers that attend to everything and, where
there are such, of those that attend to a window."""

from services.decode_worker.engine import sharing
from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.sharing import Found
from services.decode_worker.engine.step import Chosen
from services.decode_worker.engine.windows import WindowBlocks


class KvRoom:
    def __init__(self, blocks: BlockPool, windows: WindowBlocks | None) -> None:
        self.blocks = blocks
        self.windows = windows

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may have."""
        tokens = self.blocks.total * self.blocks.block_size
        if self.windows is None or self.windows.capacity is None:
            return tokens
        return min(tokens, self.windows.capacity)

    def found(self, sequence: Sequence) -> Found:
        """Computed blocks that begin a sequence."""
        return sharing.shared(self.blocks, self.windows, sequence)

    def fits(self, sequence: Sequence, found: Found, *, spare: int, chunk: int) -> bool:
        """Whether a sequence can begin with what was found, and ``spare`` blocks are left. Windows
        need blocks for its first ``chunk`` tokens, the others for all."""
        taken = _taken(self.blocks, found.blocks, len(found.blocks), sequence.length)
        if taken + spare > self.blocks.free_blocks:
            return False
        if self.windows is None:
            return True
        begun = len(found.blocks) * self.blocks.block_size
        tokens = min(sequence.length, begun + chunk)
        taken = _taken(self.windows, found.window_blocks, len(found.blocks), tokens)
        return taken + spare <= self.windows.free_blocks

    def begin(self, sequence: Sequence, found: Found) -> None:
        """Gives a sequence what was found, and blocks for the rest of it. Raises OutOfBlocks."""
        for block in found.blocks:
            self.blocks.share(block)
        fresh = self.blocks.blocks_for(sequence.length) - len(found.blocks)
        sequence.blocks = found.blocks + self.blocks.allocate(fresh)
        sequence.computed = len(found.blocks) * self.blocks.block_size
        sequence.published = len(found.blocks)
        if self.windows is not None:
            self.windows.begin(sequence, found.window_blocks)

    def extend(self, sequence: Sequence, tokens: int) -> int:
        """Gives it blocks for so many tokens, as far as there are any; returns for how many it has
        some."""
        wanted = self.blocks.blocks_for(tokens) - len(sequence.blocks)
        if wanted > 0:
            sequence.blocks += self.blocks.allocate(min(wanted, self.blocks.free_blocks))
        room = len(sequence.blocks) * self.blocks.block_size
        if self.windows is not None:
            self.windows.extend(sequence, min(room, tokens))
            room = min(room, self.windows.room(sequence))
        return room

    def fitted(self, chunks: list[Chosen]) -> list[Chosen]:
        """As much of prompts as there are blocks for."""
        if self.windows is None:
            return chunks
        fitted = list[Chosen]()
        for one in chunks:
            begun = one.sequence.computed
            count = min(one.count, self.extend(one.sequence, begun + one.count) - begun)
            if count > 0:
                fitted.append(Chosen(one.sequence, count))
        return fitted

    def adopt(self, sequence: Sequence) -> None:
        """Takes blocks that another sequence has computed meanwhile in place of its own."""
        sharing.adopt(self.blocks, self.windows, sequence)

    def settle(self, sequence: Sequence) -> None:
        """What a step has written is there to stay."""
        sharing.publish(self.blocks, self.windows, sequence)
        if self.windows is not None:
            self.windows.trim(sequence)

    def release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.blocks)
        sequence.blocks = []
        if self.windows is not None:
            self.windows.release(sequence)

    def lose(self) -> None:
        """The contents of all blocks, which nobody holds, are gone."""
        self.blocks.lose()
        if self.windows is not None:
            self.windows.lose()


def _taken(pool: BlockPool, found: list[int], begun: int, tokens: int) -> int:
    """Free blocks that go to a sequence of so many tokens; ``begun``: whole blocks of it that were
    computed, of which those found are taken."""
    return pool.blocks_for(tokens) - begun + sum(not pool.is_held(block) for block in found)
