"""Models that are started when they are asked for: a request has its own run for as long as it
takes (``precast.rpc.model_link``)."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, Self

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from precast.config.settings import GatewaySettings
from precast.errors import WorkerUnavailable
from precast.rpc.model_link import ListedModel, ModelLink
from services.gateway.presence import ClientGone, WhileConnected
from services.gateway.routing.pool import STOPPING, WorkerPool

_FOUND_S: Final = 10.0
"""Longest from a model's start to our connection to its worker."""
_LOOK_S: Final = 0.2
"""How often the list of workers is read meanwhile."""


class Held(AbstractAsyncContextManager["Held"], Protocol):
    """Within it the model of a request can be asked."""

    def until_sent(self, answer: Response) -> Response:
        """The answer, of which the model is held until its end instead of the context's."""


class Models(AbstractAsyncContextManager["Models"], Protocol):
    """How requests come by their models."""

    @property
    def startable(self) -> bool:
        """Whether models can be started."""

    @property
    def lost(self) -> bool:
        """Whether who starts models is away."""

    def end(self) -> None:
        """Requests that wait for a model are told that there will be none."""

    def held(self, model: str, request: Request) -> Held:
        """The body of the request has been read. Raises ``PrecastError`` as it is entered, or
        ``ClientDisconnect``."""

    async def listed(self) -> Mapping[str, ListedModel]:
        """Those that can be started, by name."""


class Present:
    """Models that run by themselves."""

    startable = False
    lost = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def end(self) -> None:
        pass

    def held(self, model: str, request: Request) -> "Held":
        return _NOTHING

    async def listed(self) -> Mapping[str, ListedModel]:
        return {}


class OnDemand:
    """Models that are started when requests hold them."""

    def __init__(self, host: str, pool: WorkerPool, *, wait_s: float) -> None:
        self._link = ModelLink(host)
        self._pool = pool
        self._wait_s = wait_s
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._link.run(), name="models on demand")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    @property
    def startable(self) -> bool:
        return self._link.connected

    @property
    def lost(self) -> bool:
        return not self._link.connected

    def end(self) -> None:
        self._link.end(WorkerUnavailable(STOPPING))

    def held(self, model: str, request: Request) -> "Held":
        return _HeldModel(self, model, request)

    async def listed(self) -> Mapping[str, ListedModel]:
        if self.lost:
            return {}
        try:
            return {model.name: model for model in await self._link.models()}
        except WorkerUnavailable:
            return {}

    async def take(self, model: str) -> int:
        """Once the model can be asked; the number is for ``release``. Raises ``PrecastError``."""
        number = await self._link.hold(model, self._wait_s)
        try:
            await self._until_found(model)
        except BaseException:
            self.release(number)
            raise
        return number

    def release(self, number: int) -> None:
        self._link.release(number)

    async def _until_found(self, model: str) -> None:
        """Its worker has been ready, and we talk to it."""
        end = time.monotonic() + _FOUND_S
        while not self._pool.reaches(model):
            if self._pool.stopping:
                raise WorkerUnavailable(STOPPING)
            if time.monotonic() > end:
                raise WorkerUnavailable(f"The worker of the model {model!r} can't be reached.")
            await self._pool.refresh()
            if not self._pool.reaches(model):
                await self._pool.wait_changed(_LOOK_S)


def models_of(settings: GatewaySettings, pool: WorkerPool) -> Models:
    if not settings.model_host:
        return Present()
    return OnDemand(settings.model_host, pool, wait_s=settings.model_wait_s)


class _Nothing:
    """A model that nobody has to hold."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def until_sent(self, answer: Response) -> Response:
        return answer


class _HeldModel:
    def __init__(self, models: OnDemand, model: str, request: Request) -> None:
        self._models = models
        self._model = model
        self._request = request
        self._number: int | None = None
        """None: nothing is held, or the answer has it."""

    async def __aenter__(self) -> Self:
        try:
            async with WhileConnected(self._request.scope, self._request.receive):
                self._number = await self._models.take(self._model)
        except ClientGone:
            raise ClientDisconnect from None
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._number is not None:
            self._models.release(self._number)

    def until_sent(self, answer: Response) -> Response:
        number, self._number = self._number, None
        assert number is not None, "asked for outside of the context"
        return _Holding(answer, self._models, number)


class _Holding(Response):
    """An answer that holds a model."""

    def __init__(self, answer: Response, models: OnDemand, number: int) -> None:
        super().__init__()
        self._answer = answer
        self._models = models
        self._number = number

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        finally:
            self._models.release(self._number)


_NOTHING: Final = _Nothing()
