"""Addresses of servers: ``host:port``, with an IPv6 host in brackets."""

import ipaddress
import re
import socket
from typing import Final, NamedTuple, Self

MAX_LENGTH: Final = 260
"""Characters: the longest host name and a port."""
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?")
_WILDCARDS: Final = ("0.0.0.0", "::", "*")


class Address(NamedTuple):
    """``str`` of it is what gRPC takes."""

    host: str
    """A name or an IP address, without brackets."""
    port: int
    """0: the system chooses one when a server is bound."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ``ValueError`` with a reason that follows the name of a setting."""
        host, colon, port = text.rpartition(":")
        if len(text) > MAX_LENGTH or not colon or not _is_port(port):
            raise ValueError("must be host:port")
        if host.startswith("[") and host.endswith("]"):
            return cls(_ipv6(host[1:-1]), int(port))
        if host != "*" and not _HOST.fullmatch(host):
            raise ValueError("must be host:port, with an IPv6 address in brackets")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def wildcard(self) -> bool:
        """Whether it stands for all addresses of this machine: nobody can connect to it."""
        return self.host in _WILDCARDS

    def at(self, port: int) -> "Address":
        return self._replace(port=port)


def advertised(advertise: str, bound_port: int) -> str:
    """Where others reach a server: with the bound port where the system chose it."""
    address = Address.parse(advertise)
    return advertise if address.port else str(address.at(bound_port))


def reachable(listen: str) -> str:
    """The address under which others reach a server that listens at ``listen``."""
    address = Address.parse(listen)
    return str(address._replace(host=socket.gethostname())) if address.wildcard else listen


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there: a name or an IP address."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= 65535


def _ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise ValueError(f"[{text}] is not an IPv6 address") from None
