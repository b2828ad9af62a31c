"""What graphs a worker wants, and the artifacts that it may load for them."""

from dataclasses import dataclass

from precast.system.sealed_file import SealedFile

Identity = tuple[tuple[str, int], ...]
"""Key and version of each rank's artifact."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Verified artifacts for steps of up to ``num_tokens`` tokens, one for each rank."""

    num_tokens: int
    graphs: tuple[SealedFile, ...]
    keys: tuple[str, ...]
    versions: tuple[int, ...]
    layer_us: float = 0.0
    """Time of a layer in the slowest rank; 0: not known."""
    signed: bool = True
    """False where only the switch for unsigned graphs lets one of them through."""

    @property
    def identity(self) -> Identity:
        return tuple(zip(self.keys, self.versions, strict=True))


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
    lifts: int = 0
    """How often its quarantine had been lifted before."""
