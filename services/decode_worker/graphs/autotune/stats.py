"""What sizes of steps traffic makes, and what of it is padding."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

MIN_STEPS: Final = 500
"""A window with fewer steps says too little to act upon."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Steps of some time."""

    decode: Counter[int]
    """Steps that only decode, by tokens."""
    replayed: Counter[int]
    """Steps of any kind, by the captured size that ran; 0: eagerly."""

    @property
    def steps(self) -> int:
        return self.replayed.total()


@dataclass(kw_only=True)
class StepStats:
    """Counts steps: since the start, and since the last window was taken."""

    decode: Counter[int] = field(default_factory=Counter)
    """Steps that only decode, by tokens."""
    prompt: Counter[int] = field(default_factory=Counter)
    """Steps with tokens of prompts, by tokens."""
    replayed: Counter[int] = field(default_factory=Counter)
    """Steps by the captured size that ran; 0: eagerly."""
    live_tokens: int = 0
    """Tokens in replayed steps, padding left out."""
    padding_tokens: int = 0
    _window: Window = field(default_factory=lambda: Window(decode=Counter(), replayed=Counter()))

    def count(self, tokens: int, size: int, *, decoding: bool, times: int = 1) -> None:
        """Steps of ``tokens`` have run with the graph of ``size``; 0: eagerly."""
        (self.decode if decoding else self.prompt)[tokens] += times
        self.replayed[size] += times
        self._window.replayed[size] += times
        if decoding:
            self._window.decode[tokens] += times
        if size:
            self.live_tokens += tokens * times
            self.padding_tokens += (size - tokens) * times

    def take_window(self) -> Window | None:
        """Steps since the last window, once there are enough."""
        if self._window.steps < MIN_STEPS:
            return None
        taken, self._window = self._window, Window(decode=Counter(), replayed=Counter())
        return taken
