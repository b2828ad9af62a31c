"""The state of one graph size: one value at a time, changed by pure functions.

========  ===========================  ==================================================
state     the ranks hold               what happens next
========  ===========================  ==================================================
Absent    nothing                      a candidate may be offered
Pending   ``serving``, or nothing      ``next`` is loaded between two steps
Loading   ``serving`` until they have  the ranks answer; meanwhile ``after`` may be
          loaded ``next``              offered, to be loaded behind ``next``
Loaded    ``serving``                  it is replayed until something else is wanted
Dropping  ``serving``                  it is dropped between two steps, before anything
                                       is loaded; then ``next`` is pending
========  ===========================  ==================================================

Events: ``offered``, ``reviewed`` (some candidates are not acceptable any more: quarantined,
refused, revoked, or of a size that nobody wants), ``load_started``, ``answered``, ``dropped``, and
``group_lost`` (the ranks are gone, and new ones hold nothing). While ranks load a graph nothing is
decided about it: what they hold is known only once they have answered, so it is reviewed then.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from services.decode_worker.graphs.candidates import Candidate

Acceptable = Callable[[Candidate], bool]


@dataclass(frozen=True, kw_only=True)
class Absent:
    pass


@dataclass(frozen=True, kw_only=True)
class Pending:
    next: Candidate
    serving: Candidate | None = None


@dataclass(frozen=True, kw_only=True)
class Loading:
    next: Candidate
    serving: Candidate | None = None
    after: Candidate | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    serving: Candidate


@dataclass(frozen=True, kw_only=True)
class Dropping:
    serving: Candidate
    next: Candidate | None = None


SizeState = Absent | Pending | Loading | Loaded | Dropping
ABSENT = Absent()


def in_ranks(state: SizeState) -> Candidate | None:
    """What the ranks hold; while they load, what they held before."""
    return None if isinstance(state, Absent) else state.serving


def newest(state: SizeState) -> Candidate | None:
    """What the ranks will hold once everything that is due has been done."""
    match state:
        case Absent():
            return None
        case Pending() | Dropping():
            return state.next
        case Loading():
            return state.after or state.next
        case Loaded():
            return state.serving


def offered(state: SizeState, candidate: Candidate) -> SizeState:
    """An acceptable candidate is to be loaded; the one that was to be loaded before is not."""
    match state:
        case Absent():
            return Pending(next=candidate)
        case Pending() | Loaded():
            return _replacing(state.serving, candidate)
        case Loading():
            same = candidate.identity == state.next.identity
            return replace(state, after=None if same else candidate)
        case Dropping():
            return replace(state, next=candidate)


def reviewed(state: SizeState, acceptable: Acceptable) -> SizeState:
    """Without what is not acceptable any more."""

    def kept(candidate: Candidate | None) -> Candidate | None:
        return candidate if candidate and acceptable(candidate) else None

    match state:
        case Absent():
            return state
        case Loading():
            return replace(state, after=kept(state.after))
        case Dropping():
            return replace(state, next=kept(state.next))
        case Pending(serving=None):
            return state if acceptable(state.next) else ABSENT
        case Pending(next=following, serving=Candidate() as serving):
            return _with(serving, kept(following), acceptable)
        case Loaded(serving=serving):
            return _with(serving, None, acceptable)
        case _:  # mypy does not see that the cases of Pending are all there are
            raise AssertionError(state)


def load_started(state: Pending) -> Loading:
    return Loading(next=state.next, serving=state.serving)


def answered(state: Loading, *, accepted: bool) -> SizeState:
    """Every rank has loaded ``next``; or one refused it, and all have been told to drop the size,
    since some may have swapped it in already."""
    if not accepted:
        return Pending(next=state.after) if state.after else ABSENT
    return _replacing(state.next, state.after) if state.after else Loaded(serving=state.next)


def dropped(state: Dropping) -> SizeState:
    """The ranks have been told."""
    return Pending(next=state.next) if state.next else ABSENT


def group_lost(state: SizeState) -> SizeState:
    """The ranks are gone: new ones load what is newest, unless it is to be dropped."""
    following = newest(state)
    return Pending(next=following) if following else ABSENT


def _replacing(serving: Candidate | None, candidate: Candidate) -> SizeState:
    if serving is not None and serving.identity == candidate.identity:
        return Loaded(serving=serving)
    return Pending(next=candidate, serving=serving)


def _with(serving: Candidate, following: Candidate | None, acceptable: Acceptable) -> SizeState:
    if not acceptable(serving):
        return Dropping(serving=serving, next=following)
    return Pending(next=following, serving=serving) if following else Loaded(serving=serving)
