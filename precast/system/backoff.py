"""How long to wait before something that failed is tried again."""

import random
from dataclasses import dataclass
from typing import Final

_RANDOM: Final = random.SystemRandom()
_MAX_DOUBLINGS: Final = 64


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Waits that double with every failure in a row, with jitter: what failed together for one
    reason, such as a Redis that ended, doesn't come back in the same instant."""

    first_s: float
    """Longest wait after the first failure."""
    max_s: float = float("inf")

    def limit_s(self, failures: int) -> float:
        """Longest wait after so many failures in a row; 0 after none."""
        if failures < 1:
            return 0.0
        return min(self.max_s, self.first_s * 2.0 ** min(failures - 1, _MAX_DOUBLINGS))

    def wait_s(self, failures: int) -> float:
        """A wait between half of ``limit_s`` and all of it."""
        return self.limit_s(failures) * _RANDOM.uniform(0.5, 1.0)
