"""What a request has used: told by whoever answers it, read by whoever let it in."""

from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

_KEY: Final = "precast.usage"
"""Where it is in the request's scope."""


@dataclass
class Usage:
    tokens: int = 0
    """Of prompts and answers."""

    def watch(self, scope: Scope) -> Scope:
        """The scope of a request whose tokens are counted here."""
        return {**scope, _KEY: self}


def count_tokens(scope: Scope, tokens: int) -> None:
    """Add to what the request of this scope has used."""
    if usage := scope.get(_KEY):
        usage.tokens += tokens
