"""How long steps take, learned from those that were: how much of prompts fits beside decoding.

A step takes what its decoding sequences take without prompts, and so much for each token of a
prompt. Both are averages of the last few steps, so that they follow the context's length, the
graphs that are loaded and whatever else the machine does.
"""

from typing import Final

_WEIGHT: Final = 0.3
"""Of the newest step in an average."""
_MARGIN: Final = 0.8
"""Of the gap that is planned with: steps of one kind differ."""
FIRST_TOKENS: Final = 64
"""Of prompts beside decoding, before anything is known."""
LEAST_TOKENS: Final = 16
"""Whatever it costs: or prompts would never end, and a step reads all weights for fewer too."""


class Pace:
    def __init__(self, gap_s: float) -> None:
        """``gap_s``: how long a step may take in which sequences decode beside prompts."""
        self._gap_s = gap_s
        self._decode_s: dict[int, float] = {}
        """By the number of sequences that decode."""
        self._token_s: float | None = None

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step is over."""
        if prompt_tokens == 0:
            self._decode_s[decoding] = _average(self._decode_s.get(decoding), seconds)
        elif prompt_tokens >= LEAST_TOKENS or self._token_s is None:
            each = max(0.0, seconds - self.decode_s(decoding)) / prompt_tokens
            self._token_s = _average(self._token_s, each)

    def decode_s(self, decoding: int) -> float:
        """What a step takes in which so many decode; 0 if nothing is known."""
        if not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda known: abs(known - decoding))]

    def prompt_tokens(self, decoding: int) -> int:
        """How many tokens of prompts fit into a step in which so many decode."""
        if self._token_s is None:
            return FIRST_TOKENS
        room = self._gap_s * _MARGIN - self.decode_s(decoding)
        return max(LEAST_TOKENS, int(room / max(self._token_s, 1e-9)))

    def expected_s(self, decoding: int, prompt_tokens: int) -> float | None:
        """What a step should take; None while too little is known."""
        if (decoding and not self._decode_s) or (prompt_tokens and self._token_s is None):
            return None
        return self.decode_s(decoding) + prompt_tokens * (self._token_s or 0.0)


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else before + _WEIGHT * (newest - before)
