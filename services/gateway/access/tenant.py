"""Whose a request is: what one tenant has stored is nobody else's."""

from typing import Final

from starlette.types import Scope

_KEY: Final = "precast.tenant"


def tenant_scope(scope: Scope, name: str) -> Scope:
    """The scope of a request of this tenant: its API key's id."""
    return {**scope, _KEY: name}


def tenant(scope: Scope) -> str:
    """Of the request of this scope; "" where no key is asked for."""
    return str(scope.get(_KEY, ""))
