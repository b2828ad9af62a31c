"""How gateways have ``serve`` start models: a Unix socket, a line of JSON for each message.

A gateway holds a model from the first moment of a request to the last of its answer, and what is
held is not put to sleep. What a gateway holds ends with its connection, so one that dies leaves
nothing behind. Both sides are on one host and of one user; Redis, which may be down, full or on
another host, would add leases and polling to what the kernel tells at once.
"""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, Literal, Protocol

import msgspec
from msgspec import Struct

from precast.errors import ModelNotFound, Overloaded, PrecastError, WorkerUnavailable
from precast.log import get_logger
from precast.rpc.local_link import of_our_user
from precast.system.backoff import Backoff

log = get_logger(__name__)

_MAX_LINE_BYTES: Final = 4 << 20
_MAX_AT_ONCE: Final = 4096
"""Asks of one connection that have no answer yet."""
_MAX_UNREAD_BYTES: Final = 16 << 20
"""Answers that a gateway may leave unread before it is given up."""
_MARGIN_S: Final = 2.0
"""How much longer than it was told to wait an answer may take."""
_LIST_S: Final = 10.0
_RECONNECT: Final = Backoff(first_s=0.1, max_s=2.0)
_ERRORS: Final[dict[str, type[PrecastError]]] = {
    kind.__name__: kind for kind in (ModelNotFound, Overloaded, WorkerUnavailable)
}
"""Those that keep their kind on their way; others arrive as the last one."""


class ListedModel(Struct, frozen=True, kw_only=True):
    """A model that can be started."""

    name: str
    created: int
    """When its folder was changed last (Unix, s)."""
    context_length: int
    """Tokens of a sequence, at the most."""
    parent: str = ""
    """The model whose adapter it is; empty: it is none."""


class _Ask(Struct, frozen=True, kw_only=True):
    number: int
    """Unique to the connection."""
    what: Literal["hold", "release", "list"]
    """A release has the number of what it releases, and no answer."""
    model: str = ""
    wait_s: float = 0.0


class _Answer(Struct, frozen=True, kw_only=True):
    number: int
    error: str = ""
    """Its class; empty: what was asked for is done."""
    message: str = ""
    models: Sequence[ListedModel] = ()


class Hold(Protocol):
    """A model that is kept running."""

    def release(self) -> None:
        """Once, when nothing needs it any more."""


class Host(Protocol):
    """Who starts models."""

    async def hold(self, model: str, wait_s: float) -> Hold:
        """Once the model is ready. Raises ``ModelNotFound``, ``Overloaded`` where too many wait, or
        ``WorkerUnavailable`` with the reason: it can't be started, or not within the time."""

    async def models(self) -> Sequence[ListedModel]:
        """All that can be started."""


@asynccontextmanager
async def serving_models(name: str, host: Host) -> AsyncIterator[None]:
    """Lets gateways of the same user ask under this name, which nobody else on the host has."""
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_Connection(host, reader, writer).serve())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(_address(name))
    server = await asyncio.start_unix_server(accept, sock=listener, limit=_MAX_LINE_BYTES)
    try:
        yield
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One gateway, as the host sees it."""

    def __init__(
        self, host: Host, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._host = host
        self._reader = reader
        self._writer = writer
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._held: dict[int, Hold] = {}

    async def serve(self) -> None:
        """Until either end is done with it; what was held is released then."""
        try:
            if of_our_user(self._writer.get_extra_info("socket")):
                await self._read()
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning("a gateway's connection failed", reason=str(error))
        finally:
            asking = list(self._asking.values())
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            for hold in self._held.values():
                hold.release()
            self._writer.close()

    async def _read(self) -> None:
        while line := await self._reader.readline():
            ask = msgspec.json.decode(line, type=_Ask)
            if ask.what == "release":
                self._release(ask.number)
            elif len(self._asking) < _MAX_AT_ONCE:
                self._asking[ask.number] = asyncio.create_task(self._answer(ask))
            else:
                self._say(_refusal(ask.number, Overloaded("too many requests wait for models")))

    def _release(self, number: int) -> None:
        if (hold := self._held.pop(number, None)) is not None:
            hold.release()
        elif (task := self._asking.pop(number, None)) is not None:  # it may not have begun
            task.cancel()

    async def _answer(self, ask: _Ask) -> None:
        try:
            self._say(await self._do(ask))
        except PrecastError as error:
            self._say(_refusal(ask.number, error))
        except Exception:  # a defect: the request is told, and others go on
            log.exception("a model's start failed unexpectedly", model=ask.model)
            self._say(_refusal(ask.number, WorkerUnavailable("internal error")))
        finally:
            self._asking.pop(ask.number, None)

    async def _do(self, ask: _Ask) -> _Answer:
        if ask.what == "list":
            return _Answer(number=ask.number, models=await self._host.models())
        self._held[ask.number] = await self._host.hold(ask.model, ask.wait_s)
        return _Answer(number=ask.number)

    def _say(self, answer: _Answer) -> None:
        self._writer.write(msgspec.json.encode(answer) + b"\n")
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._writer.transport.abort()


def _refusal(number: int, error: PrecastError) -> _Answer:
    return _Answer(number=number, error=type(error).__name__, message=str(error))


class ModelLink:
    """A gateway's end, which comes back by itself.

    What is wanted, held models included, is said again on a new connection.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers = itertools.count(1)
        self._wanted: dict[int, bytes] = {}
        """What was asked for and is still wanted."""
        self._answers: dict[int, asyncio.Future[_Answer]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._ended: PrecastError | None = None

    @property
    def connected(self) -> bool:
        return self._writer is not None

    async def run(self) -> None:
        """Keeps connected until cancelled."""
        failures = 0
        while True:
            try:
                await self._converse()
                failures = 0
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                failures += 1
                if failures == 1:
                    log.warning("no connection to who starts models", reason=str(error))
            await asyncio.sleep(_RECONNECT.wait_s(failures + 1))

    async def hold(self, model: str, wait_s: float) -> int:
        """Once the model is ready; the number is for ``release``. Raises as ``Host.hold``."""
        ask = _Ask(number=next(self._numbers), what="hold", model=model, wait_s=wait_s)
        try:
            await self._ask(ask, wait_s + _MARGIN_S)
        except BaseException:
            self.release(ask.number)
            raise
        return ask.number

    def release(self, number: int) -> None:
        self._wanted.pop(number, None)
        self._write(_line(_Ask(number=number, what="release")))

    async def models(self) -> Sequence[ListedModel]:
        """All that can be started. Raises ``WorkerUnavailable``."""
        ask = _Ask(number=next(self._numbers), what="list")
        try:
            return (await self._ask(ask, _LIST_S)).models
        finally:
            self._wanted.pop(ask.number, None)

    def end(self, reason: PrecastError) -> None:
        """Nothing is waited for from now on."""
        self._ended = reason
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(reason)

    async def _ask(self, ask: _Ask, wait_s: float) -> _Answer:
        if self._ended is not None:
            raise self._ended
        answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._answers[ask.number] = answer
        line = self._wanted[ask.number] = _line(ask)
        self._write(line)
        try:
            async with asyncio.timeout(wait_s):
                found = await answer
        except TimeoutError:
            raise WorkerUnavailable(f"Who starts models did not answer in {wait_s:g} s.") from None
        finally:
            del self._answers[ask.number]
        if found.error:
            raise _ERRORS.get(found.error, WorkerUnavailable)(found.message)
        return found

    async def _converse(self) -> None:
        reader, writer = await self._connect()
        self._writer = writer
        try:
            for line in self._wanted.values():
                writer.write(line)
            while line := await reader.readline():
                answer = msgspec.json.decode(line, type=_Answer)
                waiting = self._answers.get(answer.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        finally:
            self._writer = None
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            client.connect(_address(self._name))  # never waits: it is refused, or done
            if not of_our_user(client):
                raise PermissionError("another user's process")
            return await asyncio.open_unix_connection(sock=client, limit=_MAX_LINE_BYTES)
        except OSError:
            client.close()
            raise

    def _write(self, line: bytes) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):  # it is said again once it is back
                self._writer.write(line)


def _line(ask: _Ask) -> bytes:
    return msgspec.json.encode(ask) + b"\n"


def _address(name: str) -> str:
    """In the abstract namespace: it ends with the process, and no path is too long for it."""
    return f"\0precast-{name}"
