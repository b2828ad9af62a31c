"""Addresses of servers as text."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precast.rpc.address import Address, advertised, reachable


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7200", "127.0.0.1", 7200),
        ("worker-3.ns_1.svc:0", "worker-3.ns_1.svc", 0),
        ("[::1]:65535", "::1", 65535),
        ("[0:0::1]:80", "::1", 80),
        ("[::]:7200", "::", 7200),
    ],
)
def test_parts(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == (host, port)
    assert Address.parse(str(Address.parse(text))) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", ":7200", "host:", "host:65536", "host:7x", "host:-1", "host:٣"),
        *("::1:7200", "[::1]", "[host]:1", "[::1:7200", "a b:1", "../x:1", "host\n:1", "host:1\n"),
        *("http://host:1", "unix:/tmp/x:1", "h" * 300 + ":1", "host:000000001"),
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"host:port|IPv6"):
        Address.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert Address.parse(str(address)) == address


def test_what_others_are_told() -> None:
    assert advertised("127.0.0.1:0", 7201) == "127.0.0.1:7201"
    assert advertised("[::1]:0", 7201) == "[::1]:7201"
    assert advertised("host:7200", 7201) == "host:7200"
    for wildcard in ("0.0.0.0", "[::]"):
        assert reachable(f"{wildcard}:7200") == f"{socket.gethostname()}:7200"
    assert reachable("[::1]:7200") == "[::1]:7200"
