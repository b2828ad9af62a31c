"""Lets through who has an API key, where keys are asked for."""

from collections.abc import Collection
from functools import partial
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from precast.access.api_keys import ApiKey, KeyRing
from precast.access.api_keys import Scope as AccessScope
from services.gateway.access.quota import Quota, Refusal, Ticket
from services.gateway.access.tenant import tenant_scope
from services.gateway.openai.errors import ApiError

_BEARER: Final = "bearer "


class Guard:
    """Asks for a key everywhere but at the ``free`` paths."""

    def __init__(
        self, app: ASGIApp, *, keys: KeyRing, quota: Quota, free: Collection[str] = ()
    ) -> None:
        self._app = app
        self._keys = keys
        self._quota = quota
        self._free = frozenset(free)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._free or self._keys.open:
            await self._app(scope, receive, send)
            return
        try:
            key = self._key(scope)
            await self._admitted(key, tenant_scope(scope, key.id), receive, send)
        except _Refused as refused:
            refused.error.headers["connection"] = "close"  # the body is not read
            await refused.error.response(scope["path"])(scope, receive, send)

    def _key(self, scope: Scope) -> ApiKey:
        sent = _sent(Headers(scope=scope))
        if not sent:
            message = "You didn't provide an API key: send it as a bearer token (Authorization)."
            raise _Refused(ApiError(401, message, code="invalid_api_key", headers=_CHALLENGE))
        key = self._keys.find(sent)
        if key is None:
            message = "Incorrect API key provided."
            raise _Refused(ApiError(401, message, code="invalid_api_key", headers=_CHALLENGE))
        if AccessScope.INFERENCE not in key.scopes:
            message = "This API key is not for inference."
            raise _Refused(ApiError(403, message, code="insufficient_permissions"))
        return key

    async def _admitted(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        ticket = Ticket(key=key)
        # where tokens are limited it is let in when its prompt was read, for their sake
        early = key.tokens_per_minute is None
        refusal = await self._quota.enter(ticket) if early else self._quota.refused(key)
        if refusal is not None:
            raise _Refused(_limited(key, refusal))
        try:
            ticket.usage.on_expected(partial(self._expect, ticket))
            await self._app(ticket.usage.watch(scope), receive, send)
        finally:
            await self._quota.leave(ticket)

    async def _expect(self, ticket: Ticket, tokens: int) -> None:
        """Raises ``ApiError`` if a limit of the key's is reached."""
        if not ticket.asked and (refusal := await self._quota.enter(ticket, tokens)) is not None:
            raise _limited(ticket.key, refusal)


_CHALLENGE: Final = {"www-authenticate": "Bearer"}


class _Refused(Exception):
    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def _sent(headers: Headers) -> str:
    """As OpenAI's clients send a key, or as Anthropic's do."""
    authorization = headers.get("authorization", "")
    if authorization.lower().startswith(_BEARER):
        return authorization[len(_BEARER) :].strip()
    return headers.get("x-api-key", "")


def _limited(key: ApiKey, refusal: Refusal) -> ApiError:
    return ApiError(
        429,
        f"The API key {key.name!r} has reached its limit of {refusal.limit}.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(refusal.retry_after_s)},
    )
