"""What workers probably have in their prefix caches: hashes of blocks by what was sent where.

Each block's hash stands for its tokens and all before them, so that a prompt's hashes are a path
in a tree. What is kept for a worker is bounded; what was used longest ago goes first, as it does at
the worker. It is a guess: a wrong one costs a prefill, no more.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 32
"""Tokens; workers' blocks have so many by default."""
MAX_BLOCKS: Final = 1 << 15
"""Kept for a worker: a million tokens, some 4 MB."""

Hashes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """A prompt, as the index knows it."""

    hashes: Hashes
    """Of its whole blocks."""
    tail: Sequence[int]
    """Tokens behind them."""

    def followed_by(self, tokens: Sequence[int]) -> "Prefix":
        return _extended(self.hashes, [*self.tail, *tokens])


def prefix_of(tokens: Sequence[int], salt: str = "") -> Prefix:
    """``salt``: blocks of another one are never shared."""
    return _extended((), tokens, salt)


def _extended(before: Hashes, tokens: Sequence[int], salt: str = "") -> Prefix:
    hashes = list(before)
    last: object = before[-1] if before else salt
    whole = len(tokens) // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        last = hash((last, *tokens[start : start + BLOCK]))
        hashes.append(last)
    return Prefix(hashes=tuple(hashes), tail=list(tokens[whole:]))


class PrefixIndex:
    """Of one worker."""

    def __init__(self, most: int = MAX_BLOCKS) -> None:
        self.most = most
        """Blocks to be kept."""
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def found(self, hashes: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that the worker has."""
        count = next((at for at, one in enumerate(hashes) if one not in self._blocks), len(hashes))
        return count * BLOCK

    def add(self, hashes: Sequence[int]) -> None:
        """The worker has, or will have, these blocks. Of a prompt its end goes first."""
        for one in reversed(hashes):
            self._blocks[one] = None
            self._blocks.move_to_end(one)
        while len(self._blocks) > self.most:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """The worker has lost its cache."""
        self._blocks.clear()
