"""What a request has used: told by whoever answers it, read by whoever let it in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

_KEY: Final = "precast.usage"
"""Where it is in the request's scope."""


@dataclass
class Usage:
    _count: Callable[[], int] | None = None

    @property
    def tokens(self) -> int:
        """Of prompts and answers, as far as they have come."""
        return 0 if self._count is None else self._count()

    def follow(self, count: Callable[[], int]) -> None:
        """``tokens`` is what ``count`` says, from now on."""
        self._count = count

    def watch(self, scope: Scope) -> Scope:
        """The scope of a request whose tokens are counted here."""
        return {**scope, _KEY: self}


def count_tokens(scope: Scope, count: Callable[[], int]) -> None:
    """What the request of this scope uses is what ``count`` says, from now on."""
    if (usage := scope.get(_KEY)) is not None:
        usage.follow(count)
