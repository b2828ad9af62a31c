"""How long steps take, learned from those that were: how much of prompts fits beside decoding.

A step takes what its decoding sequences take without prompts, and so much for each token of a
prompt. Both are averages of the last few steps, so that they follow the context's length, the
graphs that are loaded and whatever else the machine does.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

_WEIGHT: Final = 0.3
"""Of the newest step in an average."""
_MARGIN: Final = 0.8
"""Of the gap that is planned with: steps of one kind differ."""
STRETCH: Final = 2.5
"""Times as long as decoding alone a step with prompts may take: who reads a stream sees a wait by
what he is used to."""
LEAST_GAP_S: Final = 0.045
"""Where decoding is quicker still: nobody sees it, and steps of few tokens are dear."""
FIRST_TOKENS: Final = 64
"""Of prompts beside decoding, before anything is known."""
GUESSED_GROWTH: Final = 0.05
"""How much longer each further token is guessed to make a step of a size that was not seen: little,
so that it is tried."""
STALE_STEPS: Final = 512
"""After so many steps a size's time is guessed again: it may have been measured at a bad moment."""
ALONE_S: Final = 0.18
"""Of a step that only prefills: another request that comes meanwhile waits for its end, and then
for its own."""
ROUND: Final = 32
"""Such steps have a multiple of so many tokens: few sizes, for which graphs are worth having."""
MOST_TOKENS: Final = 1 << 20
"""Of a step that only prefills, before anything is known: all that it may have."""
LEAST_TOKENS: Final = 16
"""Whatever it costs: or prompts would never end, and a step reads all weights for fewer too."""


class Pace:
    def __init__(self, gap_s: float) -> None:
        """``gap_s``: how long a step may take in which sequences decode beside prompts."""
        self._gap_s = gap_s
        self._decode_s: dict[int, float] = {}
        """By the number of tokens, of sequences that decode and of their drafts."""
        self._seen: dict[int, int] = {}
        """The step in which each was seen last."""
        self._steps = 0
        self._token_s: float | None = None

    def observe(self, decoding: int, prompt_tokens: int, *seconds: float) -> None:
        """Steps of so many tokens are over, which took so long each."""
        self._steps += len(seconds)
        if prompt_tokens == 0:
            self._seen[decoding] = self._steps
            self._decode_s[decoding] = _average(self._decode_s.get(decoding), seconds)
        elif prompt_tokens >= LEAST_TOKENS or self._token_s is None:
            decode_s = self.decode_s(decoding)
            each = [max(0.0, one - decode_s) / prompt_tokens for one in seconds]
            self._token_s = _average(self._token_s, each)

    def decode_s(self, decoding: int) -> float:
        """What a step takes in which so many decode; 0 if nothing is known."""
        if not self._decode_s:
            return 0.0
        return self._decode_s[min(self._decode_s, key=lambda known: abs(known - decoding))]

    def decode_costs(
        self, decoding: int, sizes: Iterable[int], *, prompts: bool = False
    ) -> dict[int, float]:
        """What steps of ``decoding`` tokens take, and of those larger ``sizes`` that keep the gap;
        empty if nothing is known. What was not seen lately is guessed from the next smaller one
        that was. ``prompts``: half of what decoding leaves of the gap is for prompts, and another
        token takes what theirs do."""
        known = {
            size: self._decode_s[size] for size, step in self._seen.items() if self._fresh(step)
        }
        known.setdefault(decoding, self.decode_s(decoding))
        if not known[decoding]:
            return {}
        most = self._gap_s * _MARGIN
        each = 0.0
        if prompts:
            most = (known[decoding] + most) / 2
            each = self._token_s or 0.0
        costs = {decoding: known[decoding]}
        for size in sizes:
            cost = (known.get(size) or _guess(size, known)) if size > decoding else math.inf
            # Beside prompts a step computes as fast as it can, and reads its weights in any case:
            # drafts are not cheap there. Of 16 streams that began at once they took a quarter of
            # all rows, and the last stream ended later for it.
            cost = max(cost, known[decoding] + (size - decoding) * each)
            if cost <= most:
                costs[size] = cost
        return costs

    def _fresh(self, step: int) -> bool:
        return self._steps - step < STALE_STEPS

    def prompt_tokens(self, decoding: int) -> int:
        """How many tokens of prompts fit into a step in which so many decode; without any, into one
        that another prompt may have to wait for."""
        if decoding == 0:
            return self._prompt_tokens_alone()
        if self._token_s is None:
            return FIRST_TOKENS
        decode_s = self.decode_s(decoding)
        gap_s = min(self._gap_s, max(LEAST_GAP_S, STRETCH * decode_s))
        room = gap_s * _MARGIN - decode_s
        return max(LEAST_TOKENS, int(room / max(self._token_s, 1e-9)))

    def _prompt_tokens_alone(self) -> int:
        if self._token_s is None:
            return MOST_TOKENS
        return max(LEAST_TOKENS, int(ALONE_S / max(self._token_s, 1e-9)) // ROUND * ROUND)

    def expected_s(self, decoding: int, prompt_tokens: int) -> float | None:
        """What a step should take; None while too little is known."""
        if (decoding and not self._decode_s) or (prompt_tokens and self._token_s is None):
            return None
        return self.decode_s(decoding) + prompt_tokens * (self._token_s or 0.0)


def _guess(size: int, known: Mapping[int, float]) -> float:
    below = max(other for other in known if other < size)
    return known[below] * (1 + GUESSED_GROWTH * (size - below))


def _average(before: float | None, newest: Sequence[float]) -> float:
    """With those that came after it, in their order."""
    average = newest[0] if before is None else before
    for one in newest:
        average += _WEIGHT * (one - average)
    return average
