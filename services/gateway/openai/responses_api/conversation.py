"""Responses that go on from earlier ones: what is added to a request, and kept of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import TypeAdapter
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from precast.errors import PrecastError
from precast.log import get_logger
from services.gateway.openai.errors import ApiError, invalid
from services.gateway.openai.responses_api.fields import InputItem, InputMessage, ResponsesRequest
from services.gateway.openai.responses_api.store import Kept, ResponseStore

log = get_logger(__name__)

_ITEMS: Final = TypeAdapter(list[InputItem])
_PREVIOUS: Final = "previous_response_id"


@dataclass(kw_only=True)
class Origin:
    """Where an answer of ``/v1/responses`` comes from."""

    body: ResponsesRequest
    """As the client wrote it."""
    whole: ResponsesRequest
    """With the conversation that it goes on from."""
    tenant: str = ""
    keeps: bool = False
    """Whether the answer is to be kept."""
    response: dict[str, Any] | None = field(default=None)
    """The answer, once it is whole."""

    def kept(self) -> Kept:
        assert self.response is not None, "it is not whole yet"
        said = [item.model_dump(exclude_none=True) for item in _items(self.whole)]
        return Kept(response=self.response, items=[*said, *self.response["output"]])


class Conversations:
    """``store``: None where nothing is kept."""

    def __init__(self, store: ResponseStore | None) -> None:
        self._store = store

    async def begin(self, body: ResponsesRequest, tenant: str) -> Origin:
        """Raises ``ApiError`` 400 where the earlier response is not there, ``Unavailable``."""
        keeps = self._store is not None and body.store is not False
        if body.previous_response_id is None:
            return Origin(body=body, whole=body, tenant=tenant, keeps=keeps)
        earlier = await self._earlier(body.previous_response_id, tenant)
        items = [*_ITEMS.validate_python(earlier.items), *_items(body)]
        whole = body.model_copy(update={"input": items})
        return Origin(body=body, whole=whole, tenant=tenant, keeps=keeps)

    async def _earlier(self, name: str, tenant: str) -> Kept:
        if self._store is None:
            message = f"'{_PREVIOUS}' is not supported: this server keeps no responses."
            raise invalid(message, _PREVIOUS, "unsupported_parameter")
        found = await self._store.get(tenant, name)
        if found is None:
            message = f"Previous response with id {name!r} not found."
            raise invalid(message, _PREVIOUS, "previous_response_not_found")
        return found

    async def get(self, name: str, tenant: str) -> dict[str, Any]:
        """Raises ``ApiError`` 404, ``Unavailable``."""
        found = await self._store.get(tenant, name) if self._store else None
        if found is None:
            raise _not_found(name)
        return found.response

    async def delete(self, name: str, tenant: str) -> None:
        """Raises ``ApiError`` 404, ``Unavailable``."""
        if not (self._store and await self._store.delete(tenant, name)):
            raise _not_found(name)

    async def keep(self, origin: Origin) -> None:
        """An answer that can't be kept is an answer all the same."""
        if self._store is None or origin.response is None:
            return
        try:
            if not await self._store.put(origin.tenant, origin.kept()):
                log.warning("response not kept: it is larger than responses_max_mb")
        except PrecastError as error:
            log.warning("response not kept", reason=str(error))

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()


class KeepingResponse(Response):
    """An answer that is kept before the client has its last part: a request that follows finds
    it."""

    def __init__(self, answer: Response, conversations: Conversations, origin: Origin) -> None:
        super().__init__()
        self._answer = answer
        self._conversations = conversations
        self._origin = origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def keeping(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await self._conversations.keep(self._origin)
            await send(message)

        await self._answer(scope, receive, keeping)


def _items(body: ResponsesRequest) -> Sequence[InputItem]:
    if isinstance(body.input, str):
        return [InputMessage(role="user", content=body.input)]
    return body.input


def _not_found(name: str) -> ApiError:
    return ApiError(404, f"Response with id {name!r} not found.", code="not_found")
