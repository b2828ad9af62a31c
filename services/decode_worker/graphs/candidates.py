"""What graphs a worker wants, and what it is offered."""

from dataclasses import dataclass
from pathlib import Path

Identity = tuple[tuple[str, int], ...]
"""Key and version of each rank's artifact."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Verified artifacts for steps of up to ``num_tokens`` tokens, one for each rank."""

    num_tokens: int
    paths: tuple[Path, ...]
    keys: tuple[str, ...]
    versions: tuple[int, ...]
    layer_us: float = 0.0
    """What a layer takes in the slowest rank; 0: not known."""
    signed: bool = True
    """False where only the switch for unsigned graphs lets one of them through."""

    @property
    def identity(self) -> Identity:
        return tuple(zip(self.keys, self.versions, strict=True))

    def is_there(self) -> bool:
        """Whether its files are: they go when nobody vouches for them any more."""
        return all(path.exists() for path in self.paths)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One size's graph specs, one for each rank."""

    num_tokens: int
    specs: tuple[dict[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Crash:
    """An artifact whose native code ended a rank."""

    key: str
    version: int
    signal: str
