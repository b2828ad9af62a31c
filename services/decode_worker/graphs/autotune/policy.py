"""Which sizes to have graphs for: adds those that pay, drops those that nobody uses.

A size pays if decode steps that are padded to a larger one now would be faster by enough. What they
would take is read off the times that verification measured, between those of the next sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.decode_worker.graphs.autotune.stats import Window
from services.decode_worker.graphs.cost import exact

MIN_GAIN: Final = 0.02
"""Share of all decode steps' time that a further size must save."""
IDLE_WINDOWS: Final = 10
"""Windows without a single replay after which a size is dropped."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One size more or less."""

    size: int
    added: bool
    reason: str


@dataclass(kw_only=True)
class AutotunePolicy:
    """The policy's memory: how long each size has been of no use."""

    max_graphs: int
    keep: frozenset[int]
    """Sizes that are never dropped: the largest, without which steps would have no graph."""
    idle: dict[int, int] = field(default_factory=dict)
    """Windows since a size was replayed."""

    def change(self, layer_us: Mapping[int, float], window: Window) -> Change | None:
        """The one change that the window calls for. ``layer_us``: loaded sizes and what a layer
        takes with each; nothing is added while one of them is not known."""
        for size in layer_us:
            self.idle[size] = 0 if window.replayed[size] else self.idle.get(size, 0) + 1
        wanted = _best(layer_us, window)
        if wanted is not None and len(layer_us) < self.max_graphs:
            return wanted
        return self._idlest(layer_us, at_once=wanted is not None)

    def _idlest(self, sizes: Mapping[int, float], *, at_once: bool) -> Change | None:
        """``at_once``: another size waits for the room."""
        least = 1 if at_once else IDLE_WINDOWS
        idle = {s: self.idle[s] for s in sizes if s not in self.keep and self.idle[s] >= least}
        if not idle:
            return None
        size = max(idle, key=lambda s: (idle[s], s))
        return Change(size=size, added=False, reason=f"no step in {idle[size]} windows")


def _best(layer_us: Mapping[int, float], window: Window) -> Change | None:
    """The size that would save most, if it saves enough."""
    if not layer_us or not all(layer_us.values()):
        return None
    steps = {t: n for t, n in window.decode.items() if t <= max(layer_us)}
    total = sum(n * _padded(layer_us, t) for t, n in steps.items())
    if not total:
        return None
    savings = {size: _saving(layer_us, steps, size) / total for size in steps}
    size = max(savings, key=lambda s: (savings[s], -s))
    if savings[size] < MIN_GAIN:
        return None
    return Change(size=size, added=True, reason=f"saves {savings[size]:.1%} of decode time")


def _saving(layer_us: Mapping[int, float], steps: Mapping[int, int], size: int) -> float:
    own = exact(layer_us, size)
    below = max((s for s in layer_us if s < size), default=0)
    return sum(n * (_padded(layer_us, t) - own) for t, n in steps.items() if below < t <= size)


def _padded(layer_us: Mapping[int, float], tokens: int) -> float:
    return layer_us[min(size for size in layer_us if size >= tokens)]


def kept_sizes(sizes: Sequence[int], prefill_buckets: Sequence[int]) -> frozenset[int]:
    """The largest of each kind."""
    return frozenset({max(sizes), *([max(prefill_buckets)] if prefill_buckets else [])})
