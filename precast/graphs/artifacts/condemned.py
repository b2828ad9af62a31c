"""What a cache has put aside because it crashed a rank, until an operator lifts its quarantine.

Each lift is counted, and what is put aside carries the count of its time: so a crash from before a
lift can be told from one after it, over restarts and from the disk too.
"""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple, Self

_LATER: Final = "{}, after its quarantine was lifted {} times"
_LATER_FORM: Final = re.compile(r"(.*), after its quarantine was lifted ([0-9]{1,9}) times")

Artifact = tuple[str, int]
"""Key and version."""


class Condemned(NamedTuple):
    """A version that crashed a rank."""

    key: str
    version: int
    signal: str
    lifts: int
    """How often its quarantine had been lifted before."""

    @classmethod
    def read(cls, key: str, version: int, reason: str) -> Self:
        """From ``reason``; anything else than that counts as the signal."""
        found = _LATER_FORM.fullmatch(reason)
        signal, lifts = (found[1], int(found[2])) if found else (reason, 0)
        return cls(key=key, version=version, signal=signal, lifts=lifts)

    @property
    def reason(self) -> str:
        """In a line, as it is kept on disk."""
        return _LATER.format(self.signal, self.lifts) if self.lifts else self.signal


class Condemnations:
    """What this process has condemned: the disk may not take it. And what was lifted since."""

    def __init__(self) -> None:
        self._known: dict[Artifact, Condemned] = {}
        self._lifts: dict[Artifact, int] = {}

    def add(self, one: Condemned) -> None:
        self._known[one.key, one.version] = one

    def lift(self, key: str, version: int, count: int) -> bool:
        """How often a quarantine was lifted; whether that is more than was known."""
        more = count > self._lifts.get((key, version), 0)
        if more:
            self._lifts[key, version] = count
        return more

    def counts(self, one: Condemned) -> bool:
        """Whether it was not lifted since."""
        return one.lifts >= self._lifts.get((one.key, one.version), 0)

    def get(self, key: str, version: int, on_disk: str | None) -> Condemned | None:
        """Of one version; ``on_disk``: why it was put aside there."""
        known = [self._known.get((key, version))]
        known += [Condemned.read(key, version, on_disk)] if on_disk is not None else []
        return next((one for one in known if one and self.counts(one)), None)

    def all(self, on_disk: Mapping[Artifact, str]) -> set[Condemned]:
        """``on_disk``: why versions were put aside there."""
        found = {
            artifact: self.get(*artifact, on_disk.get(artifact))
            for artifact in on_disk.keys() | self._known.keys()
        }
        return {one for one in found.values() if one}
