"""Blocks of the cache that sequences which begin alike have in common."""

from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.sequence import Sequence


def publish(blocks: BlockPool, sequence: Sequence) -> None:
    """Blocks that are full of written tokens, all of them known, may be shared: they hold what
    their key says even if the ranks are lost in the step that runs."""
    size = blocks.block_size
    full = min(sequence.written, sequence.known) // size
    for index in range(sequence.published, full):
        blocks.publish(sequence.blocks[index], sequence.block_key(index, size))
    sequence.published = max(sequence.published, full)


def shared(blocks: BlockPool, sequence: Sequence) -> list[int]:
    """Computed blocks that begin the sequence. At least one token is left to be computed, or there
    would be nothing to draw the next one from."""
    size = blocks.block_size
    found: list[int] = []
    while _may_share(sequence, (len(found) + 1) * size):
        block = blocks.find(sequence.block_key(len(found), size))
        if block is None:
            break
        found.append(block)
    return found


def adopt(blocks: BlockPool, sequence: Sequence) -> None:
    """Takes blocks that another sequence has computed meanwhile in place of its own."""
    size = blocks.block_size
    # Steps under way write before its own next block: what is behind that would not count.
    while not sequence.computing and may_adopt(sequence, size):
        index = sequence.computed // size
        block = blocks.find(sequence.block_key(index, size))
        if block is None:
            return
        blocks.share(block)
        blocks.free([sequence.blocks[index]])
        sequence.blocks[index] = block
        sequence.computed += size
        sequence.published = index + 1
        sequence.cached += size if sequence.is_fresh else 0


def may_adopt(sequence: Sequence, block_size: int) -> bool:
    """Whether its next tokens are a whole block, and not its last."""
    whole = sequence.computed % block_size == 0
    return whole and _may_share(sequence, sequence.computed + block_size)


def _may_share(sequence: Sequence, tokens: int) -> bool:
    """Whether so many of its first tokens need not be computed if others have been."""
    return tokens < sequence.length and sequence.may_skip(tokens)
