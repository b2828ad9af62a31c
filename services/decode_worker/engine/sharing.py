"""Blocks of the cache that sequences which begin alike have in common."""

from typing import NamedTuple

from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.windows import WindowBlocks


class Found(NamedTuple):
    """Computed blocks that begin a sequence."""

    blocks: list[int]
    window_blocks: list[int]
    """Of layers that attend to a window: the last of them."""


def publish(blocks: BlockPool, windows: WindowBlocks | None, sequence: Sequence) -> None:
    """Blocks that are full of written tokens, all of them known, may be shared: they hold what
    their key says even if the ranks are lost in the step that runs."""
    size = blocks.block_size
    full = min(sequence.written, sequence.known) // size
    for index in range(sequence.published, full):
        key = sequence.block_key(index, size)
        blocks.publish(sequence.blocks[index], key)
        if windows is not None:
            windows.publish_block(sequence, index, key)
    sequence.published = max(sequence.published, full)


def shared(blocks: BlockPool, windows: WindowBlocks | None, sequence: Sequence) -> Found:
    """Computed blocks that begin the sequence. At least one token is left to be computed, or there
    would be nothing to draw the next one from."""
    size = blocks.block_size
    found, keys = list[int](), list[bytes]()
    while _may_share(sequence, (len(found) + 1) * size):
        key = sequence.block_key(len(found), size)
        block = blocks.find(key)
        if block is None:
            break
        found.append(block)
        keys.append(key)
    if windows is None:
        return Found(found, [])
    count = windows.reach(keys)
    return Found(found[:count], windows.found(keys[:count]))


def adopt(blocks: BlockPool, windows: WindowBlocks | None, sequence: Sequence) -> None:
    """Takes blocks that another sequence has computed meanwhile in place of its own."""
    size = blocks.block_size
    # Steps under way write before its own next block: what is behind that would not count.
    while not sequence.computing and may_adopt(sequence, size):
        index = sequence.computed // size
        key = sequence.block_key(index, size)
        block = blocks.find(key)
        if block is None or not _adopt_window(windows, sequence, key):
            return
        blocks.share(block)
        blocks.free([sequence.blocks[index]])
        sequence.blocks[index] = block
        sequence.computed += size
        sequence.published = index + 1
        sequence.cached += size if sequence.is_fresh else 0
        if windows is not None:
            windows.trim(sequence)


def _adopt_window(windows: WindowBlocks | None, sequence: Sequence, key: bytes) -> bool:
    """Whether layers with a window, if there are any, have the block too; it is taken."""
    if windows is None:
        return True
    block = windows.find(key)
    if block is not None:
        windows.adopt(sequence, block)
    return block is not None


def may_adopt(sequence: Sequence, block_size: int) -> bool:
    """Whether its next tokens are a whole block, and not its last."""
    whole = sequence.computed % block_size == 0
    return whole and _may_share(sequence, sequence.computed + block_size)


def _may_share(sequence: Sequence, tokens: int) -> bool:
    """Whether so many of its first tokens need not be computed if others have been."""
    return tokens < sequence.length and sequence.may_skip(tokens)
