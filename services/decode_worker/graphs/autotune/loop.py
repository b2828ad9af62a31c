"""Changes the sizes that a worker has graphs for, one at a time, as its traffic shows."""

import asyncio

from precast.log import get_logger
from services.decode_worker.graphs.autotune.policy import AutotunePolicy
from services.decode_worker.graphs.autotune.stats import StepStats
from services.decode_worker.graphs.manager import GraphManager

log = get_logger(__name__)


async def keep_tuning(
    policy: AutotunePolicy, graphs: GraphManager, stats: StepStats, interval_s: float
) -> None:
    """Looks at a window of steps every ``interval_s``, while no graph is missing or on trial: what
    is on its way would change the picture."""
    while True:
        await asyncio.sleep(interval_s)
        if not graphs.missing and not graphs.trials.busy:
            tune(policy, graphs, stats)


def tune(policy: AutotunePolicy, graphs: GraphManager, stats: StepStats) -> None:
    """Makes the change that the last window calls for, if any."""
    window = stats.take_window()
    change = policy.change(graphs.layer_us, window) if window else None
    if change is None:
        return
    sizes = set(graphs.sizes)
    graphs.resize(sizes | {change.size} if change.added else sizes - {change.size})
    log.info(
        "graph sizes changed",
        num_tokens=change.size,
        change="added" if change.added else "dropped",
        reason=change.reason,
        sizes=graphs.sizes,
    )
