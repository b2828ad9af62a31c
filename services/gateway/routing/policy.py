"""Which worker gets a request: a pure policy over candidates.

The request goes where it should be done first: where least work is outstanding, with the work that
it makes there itself. What a worker has of the prompt in its cache is no work. So chats stay where
they were as long as that worker isn't busier than another by more than their history.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What the policy knows of a worker."""

    worker_id: str
    tier: int
    """0: ready. Higher tiers are chosen only where no lower one is left."""
    work: int
    """Tokens that are still to be computed there, of prompts and of outputs."""
    capacity: int
    """Requests that it runs at once."""
    max_context_length: int
    """Tokens."""
    last_chosen: int
    """Sequence number of the last choice of this worker; 0 if never."""
    prefix: int = 0
    """Tokens of the prompt that it probably has in its cache."""
    resumes: bool = True
    """Whether requests may begin there with output that they have already."""
    build: str = ""
    """What the bits of its logits depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a request wants of a worker."""

    tokens: int = 0
    """Room for so many, of prompt and output."""
    prompt: int = 0
    """Tokens to be in the cache before the first one is drawn."""
    output: int = 0
    """Tokens that will probably be drawn."""
    resumes: bool = False
    """It has output already."""
    build: str = ""
    """Of the worker that made that: another one's tokens may differ. Empty: any."""
    session: str = ""
    """Id of the worker that had the session's last request; it counts as having all of the prompt.
    Empty: none."""


def choose(
    candidates: Iterable[Candidate], demand: Demand, exclude: Container[str] = ()
) -> Candidate | None:
    """The candidate that meets the demand first, by its capacity.

    Among equals the one that was chosen longest ago. None if no candidate fits.
    """
    fitting = (
        candidate
        for candidate in candidates
        if _fits(candidate, demand) and candidate.worker_id not in exclude
    )
    return min(fitting, key=lambda candidate: _rank(candidate, demand), default=None)


def new_work(candidate: Candidate, demand: Demand) -> int:
    """Tokens that the request makes the worker compute."""
    known = demand.prompt if candidate.worker_id == demand.session else candidate.prefix
    return max(1, demand.prompt - known) + demand.output


def _fits(candidate: Candidate, demand: Demand) -> bool:
    resumes = candidate.resumes or not demand.resumes
    return candidate.max_context_length >= demand.tokens and resumes


def _rank(candidate: Candidate, demand: Demand) -> tuple[bool, int, float, int, str]:
    other_build = demand.build not in ("", candidate.build)
    work = (candidate.work + new_work(candidate, demand)) / max(1, candidate.capacity)
    return other_build, candidate.tier, work, candidate.last_chosen, candidate.worker_id
