"""What a stack is doing: services' states, and captures done and still wanted."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import httpx

from precast.cli import stack
from precast.cli.supervisor import Child
from precast.errors import RegistryUnavailable
from precast.fleet.leases import CompileLease, DecodeLease, Registry

_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class ServiceState:
    """One line of the view."""

    name: str
    state: str
    pid: int | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Captures:
    """Batch sizes that are replayed from graphs, of those wanted."""

    done: int
    wanted: int
    left_s: float | None
    """Estimated; None while nothing can be said."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """One look at the stack."""

    services: Sequence[ServiceState]
    captures: Captures | None
    ready: bool
    """Whether completions are answered."""

    def is_starting(self, prefix: str, but: Collection[str]) -> bool:
        """Whether a service of such a name, but for these, has not loaded its model yet."""
        return any(
            service.state in ("starting", "not started")
            for service in self.services
            if service.name.startswith(prefix) and service.name not in but
        )


@dataclass(kw_only=True)
class CaptureClock:
    """Estimates the time left from how long the captures so far have taken."""

    _first: tuple[float, int] | None = None
    _last: tuple[float, int] = field(default=(0.0, -1))

    def update(self, done: int, wanted: int, now: float) -> Captures:
        """``now``: of any monotonic clock, in seconds."""
        if self._first is None or done < self._last[1]:
            self._first = (now, done)
        if done != self._last[1]:
            self._last = (now, done)
        return Captures(done=done, wanted=wanted, left_s=self._left(wanted - done, now))

    def _left(self, missing: int, now: float) -> float | None:
        assert self._first is not None
        captured = self._last[1] - self._first[1]
        if missing <= 0:
            return 0.0
        if captured <= 0:
            return None
        each = (self._last[0] - self._first[0]) / captured
        return max(each * missing - (now - self._last[0]), 0.0)


class Observer:
    """Looks at a stack through its Redis and its gateway."""

    def __init__(self, children: Sequence[Child], redis_url: str, gateway_url: str) -> None:
        self._children = children
        self._registry = Registry.connect(redis_url)
        # It is our own child, whose certificate has the name by which others know it.
        self._http = httpx.AsyncClient(
            base_url=gateway_url,
            timeout=_TIMEOUT_S,
            trust_env=False,
            verify=False,  # noqa: S501
        )
        self._clock = CaptureClock()

    async def close(self) -> None:
        await self._http.aclose()
        await self._registry.close()

    async def look(self) -> Status:
        """Bounded, and never fails: what can't be seen is reported as such."""
        redis_up, decode, compilers = await self._leases()
        gateway = await self._gateway()
        captures = self._captures(decode)
        states = {
            stack.REDIS: "running" if redis_up else "starting",
            stack.COMPILE_WORKER: _compile_state(compilers),
            stack.GATEWAY: gateway,
        }
        services = [
            _service(child, states.get(child.spec.name) or _worker_state(child, decode))
            for child in self._children
        ]
        return Status(services=services, captures=captures, ready=gateway == "ready")

    async def _leases(self) -> tuple[bool, list[DecodeLease], list[CompileLease]]:
        try:
            decode = await self._registry.decode_workers()
            return True, decode, await self._registry.compile_workers()
        except RegistryUnavailable:
            return False, [], []

    async def _gateway(self) -> str:
        try:
            answer = await self._http.get("/ready")
        except httpx.HTTPError:
            return "starting"
        return "ready" if answer.status_code == 200 else "waiting for a worker"

    def _captures(self, decode: Sequence[DecodeLease]) -> Captures | None:
        if not decode:
            return None
        done = sum(len(lease.graphs) for lease in decode)
        wanted = done + sum(len(lease.captures_wanted) for lease in decode)
        return self._clock.update(done, wanted, time.monotonic())


def _worker_state(child: Child, leases: Sequence[DecodeLease]) -> str:
    model = stack.model_of(child.spec)
    return next((lease.state for lease in leases if lease.model == model), "starting")


def _compile_state(compilers: Sequence[CompileLease]) -> str:
    if not compilers:
        return "starting"
    queued, capturing = compilers[0].queued, compilers[0].capturing
    return f"capturing, {queued} queued" if capturing else "idle"


def _service(child: Child, state: str) -> ServiceState:
    note = (
        f"restarted {child.restarts} times, last end: {child.last_exit}" if child.restarts else ""
    )
    if child.pid is None:
        state = "restarting" if child.last_exit else "not started"
        note = note or child.last_exit
    return ServiceState(name=child.spec.name, state=state, pid=child.pid, note=note)
