"""A grammar's lexer learns what it meets, and the first mask at a place takes several times as long
as later ones. So a grammar that was compiled is walked along made-up outputs, once."""

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from services.decode_worker.constraints.matcher import Matcher

WALKS: Final = 2
STEPS: Final = 40
"""Tokens of one output."""
WARM_S: Final = 0.03
"""Processor time for a grammar."""


def warm(matcher: "Matcher", ends: Sequence[int]) -> bool:
    """``matcher``: at its beginning, where it stays. ``ends``: tokens that end a part of an output,
    which comes on if they are drawn often. Whether the walks went well: all copies share what its
    lexer may learn, and none of it may be left then."""
    until = time.thread_time() + WARM_S
    words = np.zeros(matcher.width, dtype=np.int32)
    draw = random.Random(0)  # noqa: S311
    for _ in range(WALKS):
        copy = matcher.copy()
        for _ in range(STEPS):
            if copy.error or copy.is_complete or time.thread_time() > until:
                break
            copy.fill(words)
            ending = [token for token in ends if words[token // 32] >> token % 32 & 1]
            allowed = ending if ending and draw.random() < 0.5 else _some(words, draw)
            if not allowed:
                break
            copy.take(draw.choice(allowed))
        if copy.error:
            return False
    return True


def _some(words: NDArray[np.int32], draw: random.Random) -> list[int]:
    """A few tokens that are allowed, if any is."""
    found = np.flatnonzero(words)
    if not len(found):
        return []
    at = int(draw.choice(found))
    return [32 * at + bit for bit in range(32) if words[at] >> bit & 1]
