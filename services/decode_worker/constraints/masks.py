"""Masks of the rows of one step, made while the ranks compute the step: at once where that takes no
time, in a thread where it may hold up the event loop."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.decode_worker.constraints.matcher import Matcher, Words

LIMIT_S: Final = 2.0
"""How long the masks of a step may take: others' draws wait for them. Each mask has a bound of its
own, about 15 ms of processor time, so that only a defect takes longer."""
QUICK_S: Final = 0.001
"""Masks that took less than that last time are not worth a thread: being woken takes longer on a
busy machine, and the ranks wait."""
_THREADS: Final = ThreadPoolExecutor(max_workers=4, thread_name_prefix="masks")


@dataclass(frozen=True, kw_only=True)
class MaskRows:
    rows: tuple[int, ...]
    """For each matcher: its row in ``words``, -1 for none."""
    words: Words
    """[masks, width]."""


async def masks_of(matchers: Sequence[Matcher | None]) -> MaskRows:
    """One for each matcher; none where there is none, or where it can't go on, and has an error."""
    live = [matcher for matcher in matchers if matcher is not None and not matcher.error]
    width = live[0].width if live else 0
    words = np.zeros((len(live), width), dtype=np.int32)
    if sum(matcher.taken_s for matcher in live) < QUICK_S:
        _fill(live, words, [False] * len(live))
    else:
        await _filled(live, words)
    row_of = {id(matcher): row for row, matcher in enumerate(live) if not matcher.error}
    return MaskRows(rows=tuple(row_of.get(id(matcher), -1) for matcher in matchers), words=words)


async def _filled(matchers: Sequence[Matcher], words: Words) -> None:
    done = [False] * len(matchers)
    work = asyncio.get_running_loop().run_in_executor(_THREADS, _fill, matchers, words, done)
    try:
        await asyncio.wait_for(work, LIMIT_S)
    except TimeoutError:
        for matcher, made in zip(matchers, done, strict=True):
            if not made:
                matcher.give_up(f"a token's choice took more than {LIMIT_S:g} s")


def _fill(matchers: Sequence[Matcher], words: Words, done: list[bool]) -> None:
    """Those first that were quick before."""
    for row in sorted(range(len(matchers)), key=lambda row: matchers[row].taken_s):
        began = time.perf_counter()
        try:
            matchers[row].fill(words[row])
        except BaseException as error:  # a panic of the library's is no Exception
            matchers[row].give_up(f"internal error ({type(error).__name__})")
        matchers[row].taken_s = time.perf_counter() - began
        done[row] = True
