"""What became of a graph's versions: which one serves, and why the others don't.

A note of this is kept beside the artifacts in the store, in Redis and in every compile worker.
Copies may differ for a while and be written at the same time: merging two of them is associative,
commutative and loses nothing, so all come to the same in any order. Of two marks of a version
the later one counts, but a quarantine is final until an operator lifts it. Each lift begins a new
round: marks of later rounds count, and in a later round the version may be quarantined again.
"""

import enum
import time
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

CRASH_SIGNALS: Final = ("SIGSEGV", "SIGILL", "SIGABRT", "SIGFPE")
"""Signals that native code brings upon itself. SIGKILL (an operator, or the kernel out of memory),
SIGBUS (memory that is gone: a mapped file was cut, a full file system, a broken module), other
signals and an exit say nothing about a graph."""
MAX_MARKS: Final = 64
MAX_REASON: Final = 1024
MAX_MODELS: Final = 256


class Verdict(enum.StrEnum):
    """What was decided of a version. One without a mark is good."""

    GOOD = "good"
    CANDIDATE = "candidate"
    """Published, but one worker alone tries it so far."""
    WITHDRAWN = "withdrawn"
    """Rolled back by hand; may be taken back into service."""
    QUARANTINED = "quarantined"
    """Crashed a worker, or was wrong or slow in its canary: not to be loaded by anybody."""


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A decision on one version."""

    verdict: Verdict
    reason: str = ""
    at: float
    """Unix seconds."""
    lifts: int = 0
    """How often a quarantine of the version had been lifted."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """The version that an operator has fixed; 0: none."""

    version: int = 0
    at: float = 0.0


class Lifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """All decisions on the versions of one key, and who asked for it."""

    marks: dict[int, Mark] = {}
    pin: Pin = Pin()
    models: tuple[str, ...] = ()
    """Labels beyond those in the manifests: a graph also serves models that came later."""

    def verdict(self, version: int) -> Verdict:
        mark = self.marks.get(version)
        return mark.verdict if mark else Verdict.GOOD

    def reason(self, version: int) -> str:
        mark = self.marks.get(version)
        return mark.reason if mark else ""

    def lifts(self, version: int) -> int:
        """How often a quarantine of the version was lifted."""
        mark = self.marks.get(version)
        return mark.lifts if mark else 0

    def having(self, verdict: Verdict) -> tuple[int, ...]:
        """Versions with a mark of this verdict, ascending."""
        return tuple(sorted(g for g, mark in self.marks.items() if mark.verdict is verdict))

    def serving(self, versions: Iterable[int]) -> int:
        """Of the versions that exist: the pinned one, else the newest good one; 0: none."""
        there = set(versions)
        if self.pin.version in there and self._loadable(self.pin.version):
            return self.pin.version
        return max((g for g in there if self.verdict(g) is Verdict.GOOD), default=0)

    def marked(self, version: int, verdict: Verdict, reason: str = "") -> "Lifecycle":
        """With a further decision."""
        return self._decided(version, verdict, reason, self.lifts(version))

    def lifted(self, version: int, reason: str) -> "Lifecycle":
        """Good again, whatever was decided before."""
        return self._decided(version, Verdict.GOOD, reason, self.lifts(version) + 1)

    def pinned(self, version: int) -> "Lifecycle":
        """Pinned to a version; 0 unpins."""
        return self.merged(Lifecycle(pin=Pin(version=version, at=_later(self.pin.at))))

    def labelled(self, model: str) -> "Lifecycle":
        """Asked for by this model too."""
        return self.merged(Lifecycle(models=(model,)))

    def merged(self, other: "Lifecycle") -> "Lifecycle":
        """Both sides' knowledge; of more than ``MAX_MARKS`` marks the newest versions'."""
        marks = {
            version: max(
                (m for m in (self.marks.get(version), other.marks.get(version)) if m),
                key=_weight,
            )
            for version in sorted(self.marks.keys() | other.marks.keys())[-MAX_MARKS:]
        }
        pin = max(self.pin, other.pin, key=lambda pin: (pin.at, pin.version))
        models = tuple(sorted({*self.models, *other.models})[:MAX_MODELS])
        return Lifecycle(marks=marks, pin=pin, models=models)

    def _decided(self, version: int, verdict: Verdict, reason: str, lifts: int) -> "Lifecycle":
        before = self.marks.get(version)
        at = _later(before.at if before else 0.0)
        mark = Mark(verdict=verdict, reason=reason[:MAX_REASON], at=at, lifts=lifts)
        return self.merged(Lifecycle(marks={version: mark}))

    def _loadable(self, version: int) -> bool:
        return self.verdict(version) is not Verdict.QUARANTINED


def encode_lifecycle(lifecycle: Lifecycle) -> bytes:
    return msgspec.json.encode(lifecycle)


def decode_lifecycle(raw: bytes) -> Lifecycle:
    """Raises ``msgspec.DecodeError``."""
    return _decoder.decode(raw)


def previous(lifecycle: Lifecycle, versions: Sequence[int]) -> int:
    """What a rollback goes back to: the newest good version before the serving one; 0: none."""
    serving = lifecycle.serving(versions)
    older = [g for g in versions if g < serving and lifecycle.verdict(g) is Verdict.GOOD]
    return max(older, default=0)


def _later(than: float) -> float:
    """Now, but after the decision that this one follows, whatever the clocks say."""
    return max(time.time(), than + 1e-6)


def _weight(mark: Mark) -> tuple[int, bool, float, str, str]:
    """A total order, so that merging gives the same in any order."""
    quarantined = mark.verdict is Verdict.QUARANTINED
    return mark.lifts, quarantined, mark.at, mark.verdict, mark.reason


_decoder: Final = msgspec.json.Decoder(Lifecycle)
