"""What a request has used: told by whoever answers it, read by whoever let it in."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

_KEY: Final = "precast.usage"
"""Where it is in the request's scope."""


@dataclass
class Usage:
    _count: Callable[[], int] | None = None
    _expect: Callable[[int], Awaitable[None]] | None = None

    @property
    def tokens(self) -> int:
        """Of prompts and answers, as far as they have come."""
        return 0 if self._count is None else self._count()

    def follow(self, count: Callable[[], int]) -> None:
        """``tokens`` is what ``count`` says, from now on."""
        self._count = count

    def on_expected(self, expect: Callable[[int], Awaitable[None]]) -> None:
        """``expect`` is called with the tokens that the request will use, before it does."""
        self._expect = expect

    async def expect(self, tokens: int) -> None:
        if self._expect is not None:
            await self._expect(tokens)

    def watch(self, scope: Scope) -> Scope:
        """The scope of a request whose tokens are counted here."""
        return {**scope, _KEY: self}


async def expect_tokens(scope: Scope, tokens: int) -> None:
    """The request of this scope is about to use so many. Raises whatever stands against it."""
    if (usage := scope.get(_KEY)) is not None:
        await usage.expect(tokens)


def count_tokens(scope: Scope, count: Callable[[], int]) -> None:
    """What the request of this scope uses is what ``count`` says, from now on."""
    if (usage := scope.get(_KEY)) is not None:
        usage.follow(count)
