"""Rotary embedding as ``config.json`` describes it: frequencies and how they are scaled."""

import math
from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from precast.errors import UnsupportedArchitecture

ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn", "longrope")


class RopeConfig(BaseModel):
    """Base frequency and its scaling for long contexts."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    rope_theta: float = Field(default=10000.0, gt=1)
    rope_type: str = "default"
    """One of ``ROPE_TYPES``, or "none" for layers without positions."""
    factor: float = Field(default=1.0, gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = Field(default=8192, gt=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    """longrope: what each frequency is divided by in contexts of up to
    ``original_max_position_embeddings``, and ``long_factor`` in longer ones."""
    long_factor: tuple[float, ...] = ()

    def inverse_frequencies(self, dim: int, positions: int = 0) -> list[float]:
        """[dim / 2] angles a position, as transformers' ``ROPE_INIT_FUNCTIONS`` give them.

        All are 0 for "none": such a rotation changes nothing. ``positions``: the longest context,
        which longrope's choice hangs on: keys that are cached stay rotated as they were, so all
        sequences have the same.
        """
        plain = [self.rope_theta ** -(i / dim) for i in range(0, dim, 2)]
        if self.rope_type == "none":
            return [0.0] * len(plain)
        if self.rope_type == "linear":
            return [f / self.factor for f in plain]
        if self.rope_type == "llama3":
            return [self._llama3(f) for f in plain]
        if self.rope_type == "yarn":
            return self._yarn(plain, dim)
        if self.rope_type == "longrope":
            factors = self.long_factor if self._is_long(positions) else self.short_factor
            return [f / factor for f, factor in zip(plain, factors, strict=True)]
        return plain

    def _is_long(self, positions: int) -> bool:
        return positions > self.original_max_position_embeddings

    def check(self, dim: int) -> None:
        """Raises ValueError if its constants give no angles."""
        if self.rope_type == "longrope":
            counts = (len(self.short_factor), len(self.long_factor))
            if counts != (dim // 2, dim // 2):
                raise ValueError(f"short_factor and long_factor: {counts} numbers, not {dim // 2}")
        try:
            values = [*self.inverse_frequencies(dim), *self._long(dim), self.amplitude()]
        except ArithmeticError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"the constants of rope_type={self.rope_type} give no finite angles")

    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            return self._longrope_amplitude()
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def _long(self, dim: int) -> list[float]:
        return self.inverse_frequencies(dim, self.original_max_position_embeddings + 1)

    def _longrope_amplitude(self) -> float:
        if self.factor <= 1:
            return 1.0
        longer = math.log(self.factor) / math.log(self.original_max_position_embeddings)
        return math.sqrt(1 + longer)

    def _temperature(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def _llama3(self, frequency: float) -> float:
        length = self.original_max_position_embeddings
        turns = length * frequency / (2 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency

    def _yarn(self, plain: list[float], dim: int) -> list[float]:
        low, high = self._turning(self.beta_fast, dim), self._turning(self.beta_slow, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001

        def scaled(index: int, frequency: float) -> float:
            part = min(max((index - low) / width, 0.0), 1.0)
            return frequency / self.factor * part + frequency * (1 - part)

        return [scaled(index, frequency) for index, frequency in enumerate(plain)]

    def _turning(self, turns: float, dim: int) -> float:
        """The dimension whose pair turns this often within the original context."""
        length = self.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))


NO_ROPE: Final = RopeConfig(rope_type="none")


def parse_rope(
    settings: Mapping[str, Any] | None, theta: float, positions: int | None = None
) -> RopeConfig:
    """A rope out of ``rope_parameters`` or ``rope_scaling``; ``theta`` where they name none.

    ``positions``: the model's original context length, where the settings don't give it. Raises
    UnsupportedArchitecture for a type that we lack.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    given["rope_type"] = given.get("rope_type", given.get("type", "default"))
    given.setdefault("rope_theta", theta)
    if positions is not None:
        given.setdefault("original_max_position_embeddings", positions)
    if given["rope_type"] not in ROPE_TYPES:
        raise UnsupportedArchitecture(
            f"rope_type={given['rope_type']} is not one of: {', '.join(ROPE_TYPES)}"
        )
    if given["rope_type"] != "default" and "factor" not in given:
        raise ValueError(f"rope_type={given['rope_type']} needs a factor")
    return RopeConfig(**given)


def rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rope of a whole model: transformers 5 writes ``rope_parameters``; before that it was
    ``rope_theta`` and ``rope_scaling``."""
    return dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
