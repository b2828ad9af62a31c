"""Mutual TLS between services: who has a certificate of the fleet's own authority is who it names.

A folder holds a subfolder for each role with ``ca.crt``, ``tls.crt`` and ``tls.key`` (PEM); a
machine needs only those of the roles that it plays. Both sides of a connection show a certificate.
Hosts come and go, so a peer is known by its role, not by its host name: every certificate is also
one for the name ``precast``.
"""

from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import Any, Final, Self

import grpc

from precast.errors import ConfigError
from precast.log import get_logger
from precast.rpc.tls_files import KEY_FILE, Pem, read, state
from precast.system.file_state import FileState

log = get_logger(__name__)

NAME: Final = "precast"


class Role(StrEnum):
    """What a certificate's common name says its owner is."""

    GATEWAY = "gateway"
    DECODE_WORKER = "decode-worker"
    COMPILE_WORKER = "compile-worker"
    ADMIN = "admin"
    """Whoever runs ``precast graphs`` and ``precast workers``; may call everything."""


class Tls:
    """What one role shows and trusts, on connections that begin now: its files are read again when
    they have changed. What can't be used of them leaves everything as it was."""

    def __init__(self, folder: Path) -> None:
        """``folder``: the role's. Raises ``ConfigError``."""
        self._folder = folder
        self._lock = Lock()
        """gRPC asks from threads of its own."""
        self._state = state(folder)
        self._pem = read(folder)
        self._refused = ""

    @classmethod
    def load(cls, folder: Path | None, role: Role) -> Self | None:
        """None where there is no folder: connections are plain then. Raises ``ConfigError``."""
        return None if folder is None else cls(folder / role)

    @classmethod
    def of_this_machine(cls, folder: Path) -> Self | None:
        """As one of the roles that it plays, for what all of them may do. Raises
        ``ConfigError``."""
        role = next((role for role in Role if (folder / role / KEY_FILE).exists()), Role.ADMIN)
        return cls.load(folder, role)

    @property
    def pem(self) -> Pem:
        """As the files are now, or were when they could be used last."""
        with self._lock:
            if (now := state(self._folder)) != self._state:
                self._renew(now)
            return self._pem

    def of_server(self) -> grpc.ServerCredentials:
        """gRPC asks for the certificate before each handshake."""
        shown = self.pem

        def fetch() -> Any:  # None where nothing has changed, of which grpc's stubs don't know
            nonlocal shown
            if (now := self.pem) == shown:
                return None
            shown = now
            return _of_server(now)

        return grpc.dynamic_ssl_server_credentials(
            _of_server(shown), fetch, require_client_authentication=True
        )

    def of_channel(self) -> grpc.ChannelCredentials:
        """For one channel: those that are opened later may show another certificate."""
        return of_channel(self.pem)

    def _renew(self, now: FileState) -> None:
        """Where that fails, the next connection tries again; the log has each reason once."""
        try:
            self._pem = read(self._folder)
        except ConfigError as error:
            if str(error) != self._refused:
                log.error("new certificate not used", reason=str(error))
            self._refused = str(error)
        else:
            self._state, self._refused = now, ""
            log.info("new certificate", folder=str(self._folder))


def of_channel(pem: Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)


def _of_server(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(pem.key, pem.certificate)], root_certificates=pem.authority
    )


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
