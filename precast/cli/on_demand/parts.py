"""What the host of models deals with: models, their processes, and their state."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from precast.cli.on_demand.eviction import Occupant
from precast.errors import PrecastError


@dataclass(frozen=True, kw_only=True)
class HomeAdapter:
    """An adapter that its model is started with."""

    name: str
    created: int
    """When its folder was changed last (Unix, s)."""
    setting: str
    """As the decode worker's ``adapter`` names it."""


@dataclass(frozen=True, kw_only=True)
class HomeModel:
    """A model that can be started, and what it takes."""

    name: str
    created: int
    """When its folder was changed last (Unix, s)."""
    context_length: int
    """Tokens of a sequence, at the most."""
    kv_blocks: int
    nbytes: int
    """Of its processes, at the most: weights, adapters', KV cache and the rest."""
    adapters: tuple[HomeAdapter, ...] = ()

    def serves(self, name: str) -> bool:
        """Whether it has this name, or one of its adapters has."""
        return name == self.name or any(name == one.name for one in self.adapters)


class StartFailed(Exception):
    """A model's process ended before it was ready; the text is the reason."""


class Models(Protocol):
    """What the home folder has."""

    async def find(self, name: str) -> HomeModel:
        """The model of this name, or of the adapter that has it. Raises ``ModelNotFound``, or
        another ``PrecastError`` if it can't be served."""

    async def all(self) -> Sequence[HomeModel]:
        """What can be served, by name."""


class ModelProcess(Protocol):
    """A model's processes."""

    async def until_ready(self) -> None:
        """Raises ``StartFailed``."""

    async def until_ended(self) -> str:
        """How they ended."""

    async def stop(self) -> None:
        """All have ended, and their memory is free, when this returns. May be called again."""


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(kw_only=True)
class Resident:
    """A model that has its memory."""

    model: HomeModel
    state: State = State.STARTING
    holds: int = 0
    """Requests that need it."""
    last_used: float = field(default_factory=time.monotonic)
    told_to_stop: asyncio.Event = field(default_factory=asyncio.Event)
    crashes: int = 0
    """In a row."""

    @property
    def idle(self) -> bool:
        return self.state is State.READY and not self.holds

    def use(self) -> None:
        self.holds += 1
        self.last_used = time.monotonic()

    def release(self) -> None:
        self.holds -= 1
        self.last_used = time.monotonic()

    def leave(self) -> None:
        self.state = State.LEAVING
        self.told_to_stop.set()

    def occupant(self) -> Occupant:
        return Occupant(
            model=self.model.name,
            nbytes=self.model.nbytes,
            idle=self.idle,
            leaving=self.state is State.LEAVING,
            last_used=self.last_used,
        )


@dataclass(kw_only=True)
class Failure:
    """The last failed starts of a model."""

    reason: str
    count: int
    """In a row."""
    until: float
    """No start is tried before (monotonic, s)."""

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()


@dataclass(kw_only=True, eq=False)
class Waiter:
    """A request whose model is not ready."""

    name: str
    """What it asks for: the model, or one of its adapters."""
    model: HomeModel
    granted: asyncio.Future[Resident]

    def refuse(self, error: PrecastError) -> None:
        if not self.granted.done():
            self.granted.set_exception(error)

    def took(self) -> Resident | None:
        """What was granted, though nobody may wait for it any more."""
        done = self.granted.done() and not self.granted.cancelled()
        return self.granted.result() if done and not self.granted.exception() else None
