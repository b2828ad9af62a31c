"""Which prompts a step goes on with, and by how many tokens each.

The shortest go first, so that none waits for a long one. A quarter of what a step has for prompts
is the oldest one's, so that it gets on however many short ones come: once it is the oldest, a
prompt takes no more than four times the steps that it would take alone. Where nobody decodes, a
step that finishes a prompt is not filled up, with what it can't finish, beyond half of what it may
have: whoever waits for that one's first token waits little longer for their sake.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.sharing import may_adopt
from services.decode_worker.engine.step import Chosen


def prompt_chunks(prompts: Many[Sequence], budget: int, *, alone: bool) -> list[Chosen]:
    """How many tokens of each prompt; the oldest is first among them. ``alone``: nobody decodes."""
    if not prompts:
        return []
    counts = dict.fromkeys(prompts, 0)
    oldest = prompts[0]
    counts[oldest] = min(oldest.to_prefill, _reserved(prompts, budget))
    left, finishes = budget - counts[oldest], False
    for sequence in sorted(prompts, key=lambda s: s.to_prefill):
        more = min(sequence.to_prefill - counts[sequence], left)
        ends = counts[sequence] + more == sequence.to_prefill
        if alone and finishes and not ends:
            more = min(more, max(0, left - budget // 2))
        counts[sequence] += more
        left -= more
        finishes |= ends
    return [Chosen(sequence, count) for sequence, count in counts.items() if count]


def _reserved(prompts: Many[Sequence], budget: int) -> int:
    """Tokens that are the oldest prompt's in any case."""
    return budget if len(prompts) == 1 else max(1, budget // 4)


def unfinished_prompts(running: Iterable[Sequence], block_size: int) -> list[Sequence]:
    """Those to be prefilled, in their order, without those whose next block another sequence
    computes, or is about to."""
    found: list[Sequence] = []
    underway: set[bytes] = set()
    for sequence in running:
        keys = _keys_to_come(sequence, block_size)
        if sequence.to_prefill:
            if may_adopt(sequence, block_size) and _next_key(sequence, block_size) in underway:
                continue
            found.append(sequence)
        underway.update(keys)
    return found


def _keys_to_come(sequence: Sequence, block_size: int) -> list[bytes]:
    """Of blocks, all of whose tokens are known, that are not written yet."""
    whole = range(sequence.written // block_size, sequence.known // block_size)
    return [sequence.block_key(index, block_size) for index in whole]


def _next_key(sequence: Sequence, block_size: int) -> bytes:
    return sequence.block_key(sequence.computed // block_size, block_size)
