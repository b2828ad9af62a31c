"""Mutual TLS between services: who has a certificate of the fleet's own authority is who it names.

A folder holds a subfolder for each role with ``ca.crt``, ``tls.crt`` and ``tls.key`` (PEM); a
machine needs only those of the roles that it plays. Both sides of a connection show a certificate.
Hosts come and go, so a peer is known by its role, not by its host name: every certificate is also
one for the name ``precast``.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

import grpc

from precast.errors import ConfigError
from precast.rpc.tls_files import CA_FILE, CERTIFICATE_FILE, KEY_FILE, check

NAME: Final = "precast"


class Role(StrEnum):
    """What a certificate's common name says its owner is."""

    GATEWAY = "gateway"
    DECODE_WORKER = "decode-worker"
    COMPILE_WORKER = "compile-worker"
    ADMIN = "admin"
    """Whoever runs ``precast graphs`` and ``precast workers``; may call everything."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """What one role shows and trusts."""

    authority: bytes
    certificate: bytes
    key: bytes

    @classmethod
    def load(cls, folder: Path | None, role: Role) -> Self | None:
        """None where there is no folder: connections are plain then. Raises ``ConfigError``."""
        if folder is None:
            return None
        names = (CA_FILE, CERTIFICATE_FILE, KEY_FILE)
        try:
            authority, certificate, key = ((folder / role / name).read_bytes() for name in names)
        except OSError as error:
            raise ConfigError(f"tls_dir {error.filename}: {error.strerror}") from None
        check(folder / role, authority=authority, certificate=certificate, key=key)
        return cls(authority=authority, certificate=certificate, key=key)

    @classmethod
    def of_this_machine(cls, folder: Path) -> Self | None:
        """As one of the roles that it plays, for what all of them may do. Raises
        ``ConfigError``."""
        role = next((role for role in Role if (folder / role / KEY_FILE).exists()), Role.ADMIN)
        return cls.load(folder, role)

    def of_server(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.authority, require_client_auth=True
        )

    def of_channel(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


_DECODE: Final = "/precast.decode.v1.DecodeService/"
_GRAPHS: Final = "/precast.graphs.v1.GraphsService/"
_ALLOWED: Final[dict[str, frozenset[str]]] = {
    **dict.fromkeys(
        (_DECODE + method for method in ("Generate", "Abort", "GetStatus")),
        frozenset({Role.GATEWAY}),
    ),
    _GRAPHS: frozenset({Role.DECODE_WORKER}),
}
"""Roles beside ``admin`` that may call a method, or every method whose name begins so."""


def may_call(method: str, context: Any) -> bool:
    """Whether the caller's certificate is for this method, given as ``/package.Service/Method``.

    What is not Precast's own, health and reflection, is for all that have a certificate.
    """
    if not method.startswith("/precast."):
        return True
    names = context.auth_context().get("x509_common_name") or ()
    roles = {name.decode(errors="replace") for name in names}
    service = method[: method.rindex("/") + 1]
    allowed = _ALLOWED.get(method) or _ALLOWED.get(service, frozenset())
    return bool(roles & {Role.ADMIN, *allowed})
