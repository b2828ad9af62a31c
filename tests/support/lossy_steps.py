"""A scheduler driven to its end: steps one by one or sent ahead, and some of them lost with the
ranks."""

from collections.abc import Callable, Collection, Iterator

from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.step import ScheduledStep

BLOCK = 4
_MOST_STEPS = 2000


def small_scheduler(blocks: int, chunk: int) -> Scheduler:
    return Scheduler(
        blocks=blocks,
        block_size=BLOCK,
        max_batch_size=3,
        max_context_length=64,
        max_waiting=16,
        prefill_chunk=chunk,
        pace=Pace(0.15),
    )


def steps_over(
    engine: Scheduler,
    *,
    ahead: bool,
    lost: Collection[int],
    sent: Callable[[ScheduledStep], None] = lambda _: None,
) -> Iterator[ScheduledStep]:
    """Each step that the ranks have computed; it is applied behind the ``yield``.

    ``ahead``: one is sent while another runs. ``lost``: numbers of turns in which all that is under
    way is lost. ``sent`` is called with each step that is sent.
    """
    under_way: list[ScheduledStep] = []
    for number in range(_MOST_STEPS):
        step = engine.schedule(number)
        if number in lost and under_way:
            engine.lose_cache(under_way[0])
            under_way = []
            continue
        if step is not None:
            under_way.append(step)
            sent(step)
        while under_way and (not ahead or len(under_way) > 1 or step is None):
            done = under_way.pop(0)
            yield done
            engine.apply(done, [50] * sum(done.draws))
        if step is None and not under_way and not engine.waiting + engine.running:
            break
