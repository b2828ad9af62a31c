"""Tries a grammar before it is let in: whether it compiles, and whether its masks can be made."""

import random
import time
from typing import Final

import numpy as np

from services.decode_worker.constraints.grammar import Grammar, refusal
from services.decode_worker.constraints.matcher import Matcher, Vocabulary, Words

STEPS: Final = 24
"""Tokens of an output that is made up."""
MAX_MASK_S: Final = 0.1
"""Processor time for one mask; beside a model's steps there is less for most."""


def trial(vocabulary: Vocabulary, grammar: Grammar) -> str:
    """Why the grammar is refused; empty if it is not."""
    matcher = vocabulary.compile(grammar, quick=False)
    if matcher.error:
        return refusal(grammar.kind, matcher.error)
    if matcher.warnings:
        return refusal(grammar.kind, matcher.warnings[0])
    return _walked(matcher.copy(), grammar)


def _walked(matcher: Matcher, grammar: Grammar) -> str:
    words = np.zeros(matcher.width, dtype=np.int32)
    draw = random.Random(0)  # noqa: S311
    for step in range(STEPS):
        began = time.thread_time()
        matcher.fill(words)
        if matcher.error:
            return refusal(grammar.kind, f"is too complex: {matcher.error}")
        if time.thread_time() - began > MAX_MASK_S:
            return refusal(grammar.kind, f"takes more than {MAX_MASK_S:g} s for a token")
        allowed = _allowed(words)
        if not len(allowed):
            return refusal(grammar.kind, "allows no output" if step == 0 else "ends nowhere")
        matcher.take(draw.choice(allowed))
        if matcher.is_complete:
            return ""
    return ""


def _allowed(words: Words) -> list[int]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(bits).tolist()
    return found
