"""Which prompts a step goes on with, and by how many tokens each.

Half of what a step has left for prompts is the oldest one's, so that none starves, and the rest
goes to the shortest, so that none waits for a long one.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.sharing import may_adopt
from services.decode_worker.engine.step import Chosen


def prompt_chunks(prompts: Many[Sequence], budget: int) -> list[Chosen]:
    """How many tokens of each prompt; the oldest is first among them."""
    counts = dict.fromkeys(prompts, 0)
    if prompts:
        oldest = budget if len(prompts) == 1 else max(1, budget // 2)
        counts[prompts[0]] = min(prompts[0].to_prefill, oldest)
    budget -= sum(counts.values())
    for sequence in sorted(prompts, key=lambda s: s.to_prefill):
        more = min(sequence.to_prefill - counts[sequence], budget)
        counts[sequence] += more
        budget -= more
    return [Chosen(sequence, count) for sequence, count in counts.items() if count]


def unfinished_prompts(running: Iterable[Sequence], block_size: int) -> list[Sequence]:
    """Those to be prefilled, in their order, without those whose next block another one among them
    is about to compute."""
    found: list[Sequence] = []
    underway: set[bytes] = set()
    for sequence in running:
        if sequence.to_prefill == 0:
            continue
        whole = range(sequence.computed // block_size, sequence.length // block_size)
        keys = [sequence.block_key(index, block_size) for index in whole]
        if may_adopt(sequence, block_size) and keys[0] in underway:
            continue
        underway.update(keys)
        found.append(sequence)
    return found
