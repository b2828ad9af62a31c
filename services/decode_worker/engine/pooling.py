"""A prompt's hidden states as one vector, while its chunks are computed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(kw_only=True)
class Pooling:
    """How one prompt becomes a vector, and what has come of it.

    The sum is kept in double precision, in the order of the prompt: neither its chunks nor what
    runs beside it show in the vector.
    """

    tokens: int
    """Of the prompt."""
    last_only: bool
    """Its last token's hidden state, and not the mean of all."""
    dimensions: int
    """First values that are kept."""
    raw: bool
    """Whether the vector keeps its length; otherwise it is 1."""
    taken: int = 0
    """Tokens of the prompt whose hidden states are in the sum, or aren't looked at."""
    total: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.last_only:
            self.taken = self.tokens - 1

    def take(self, first: int, count: int, total: NDArray[np.float64]) -> None:
        """The sum [H] of ``count`` hidden states from position ``first`` on."""
        if first != self.taken:
            return  # a step that was under way when the sequence was put back has come too
        self.taken = first + count
        self.total = total if self.total is None else self.total + total

    def vector(self) -> bytes:
        """Little-endian float32 [dimensions]; empty while the prompt is not computed."""
        if self.total is None or self.taken < self.tokens:
            return b""
        vector = self.total[: self.dimensions] / (1 if self.last_only else self.tokens)
        length = float(np.linalg.norm(vector))
        if length and not self.raw:
            vector = vector / length
        return vector.astype("<f4").tobytes()
