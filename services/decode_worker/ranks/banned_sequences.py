"""Sequences of tokens that must not turn up in an output, and what may not follow therefore."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
_NOTHING: Final = np.empty(0, dtype=np.int32)


class BannedSequences:
    """Of one output. What a draw costs goes by how many lengths the sequences have."""

    def __init__(self, sequences: Sequence[bytes], output: Ints) -> None:
        """``sequences``: int32 token ids of each, at least one; ``output`` begins with these."""
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """By their earlier tokens: those that complete a sequence."""
        for data in sequences:
            *before, last = np.frombuffer(data, dtype=np.int32).tolist()
            self._ends.setdefault(tuple(before), []).append(last)
        self._lengths = sorted({len(before) for before in self._ends})
        self._output: list[int] = output.tolist()

    def add(self, token: int) -> None:
        """A token of the output."""
        self._output.append(token)

    @property
    def forbidden(self) -> Ints:
        """Tokens that would complete a sequence now."""
        found: list[int] = []
        for length in self._lengths:
            start = len(self._output) - length
            if start >= 0:
                found += self._ends.get(tuple(self._output[start:]), ())
        return np.array(found, dtype=np.int32) if found else _NOTHING
