"""gRPC between services with certificates: every door is closed without, and open to its role."""

import datetime
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from precast.access import authority
from precast.access.authority import AUTHORITY_KEY, make
from precast.errors import ConfigError
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1 import decode_service_pb2_grpc as pb_grpc
from precast.proto.graphs.v1 import graphs_service_pb2 as graphs_pb
from precast.proto.graphs.v1 import graphs_service_pb2_grpc as graphs_grpc
from precast.rpc.server import error_of, open_channel, start_server
from precast.rpc.tls import Role, Tls
from precast.rpc.tls_files import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from tests.support.command import precast
from tests.support.decode_worker import decode_worker
from tests.support.gateway_stack import Stack
from tests.support.ports import free_port

OPEN = {
    "GetStatus": {Role.GATEWAY, Role.ADMIN},
    "Abort": {Role.GATEWAY, Role.ADMIN},
    "GetGraphSpecs": {Role.ADMIN},
    "Undrain": {Role.ADMIN},
}
"""Calls of a decode worker that change nothing, and whose they are."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    done = precast("keys", "tls", folder)
    assert (done.returncode, "authority and certificates" in done.stdout) == (0, True)
    return folder


@pytest.fixture(scope="module")
def address(certificates: Path, tiny_home: Path, tiny_redis: str) -> Iterator[str]:
    """Of a decode worker that asks for certificates."""
    where = f"127.0.0.1:{free_port()}"
    settings = {"tls_dir": certificates, "batch_sizes": "1", "address": where}
    with secured(tiny_home, tiny_redis, certificates, **settings):
        yield where


def secured(home: Path, redis_url: str, certificates: Path, **settings: Any) -> Any:
    tls = Tls.load(certificates, Role.ADMIN)
    assert tls is not None
    return decode_worker(home, redis_url, "tiny", tls=tls, **settings)


@pytest.fixture
async def stubs(certificates: Path, address: str) -> AsyncIterator[dict[Role, Any]]:
    channels = {role: open_channel(address, Tls.load(certificates, role)) for role in Role}
    yield {role: pb_grpc.DecodeServiceStub(channel) for role, channel in channels.items()}
    for channel in channels.values():
        await channel.close()


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as failure:
        return failure.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", OPEN)
async def test_each_call_is_open_to_its_roles_alone(stubs: dict[Role, Any], method: str) -> None:
    request = getattr(pb, f"{method}Request")()
    codes = {
        role: await code_of(getattr(stub, method)(request, timeout=30))
        for role, stub in stubs.items()
    }
    allowed = {
        role for role, code in codes.items() if code is not grpc.StatusCode.PERMISSION_DENIED
    }
    assert allowed == OPEN[method]


async def test_a_compile_workers_calls_are_decode_workers(certificates: Path, address: str) -> None:
    """The table says so for services that this server doesn't have, too: unknown to all."""
    async with open_channel(address, Tls.load(certificates, Role.GATEWAY)) as channel:
        stub: Any = graphs_grpc.GraphsServiceStub(channel)
        call = stub.ListGraphs(graphs_pb.ListGraphsRequest(), timeout=30)
        assert await code_of(call) is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("what", ["plain", "of another authority"])
async def test_closed_without_a_certificate_of_the_fleets(
    what: str, address: str, tmp_path: Path
) -> None:
    make(tmp_path / "other")
    tls = None if what == "plain" else Tls.load(tmp_path / "other", Role.ADMIN)
    async with open_channel(address, tls) as channel:
        stub: Any = pb_grpc.DecodeServiceStub(channel)
        call = stub.GetStatus(pb.GetStatusRequest(), timeout=3)
        assert await code_of(call) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("one", None, "it may want a certificate"),
        (None, "one", "it speaks without TLS"),
        ("one", "other", "not of the authority in tls_dir"),
        ("gone", "one", "nobody listens there"),
    ],
)
async def test_why_there_is_no_connection_is_said_in_words(
    theirs: str | None, ours: str | None, said: str, tmp_path: Path
) -> None:
    loaded: dict[str | None, Tls | None] = {None: None}
    for name in ("one", "other"):
        make(tmp_path / name)
        loaded[name] = Tls.load(tmp_path / name, Role.DECODE_WORKER)
    server = await start_server("127.0.0.1:0", [], tls=loaded.get(theirs))
    if theirs == "gone":
        await server.stop(0)
    async with open_channel(f"127.0.0.1:{server.port}", loaded[ours]) as channel:
        stub: Any = pb_grpc.DecodeServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetStatus(pb.GetStatusRequest(), timeout=30)
    await server.stop(0)
    told = str(error_of(caught.value))
    assert told.startswith("can't connect: ")
    assert said in told


def test_a_gateway_serves_through_it(
    certificates: Path, address: str, tiny_home: Path, tiny_redis: str
) -> None:
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    try:
        gateway = stack.gateway(tls_dir=str(certificates))
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}
        assert gateway.post("/v1/completions", json=body).status_code == 200
    finally:
        for process in stack.started:
            process.kill()
            process.wait()


def test_commands_show_the_admins(certificates: Path, address: str, tiny_redis: str) -> None:
    variables = {"PRECAST_REDIS_URL": tiny_redis, "PRECAST_TLS_DIR": str(certificates)}
    done = precast("workers", "undrain", address, environment=variables)
    assert done.returncode == 0, done.stderr
    variables.pop("PRECAST_TLS_DIR")
    assert precast("workers", "undrain", address, environment=variables).returncode != 0


def test_made_again_they_are_of_the_same_authority(tmp_path: Path) -> None:
    assert make(tmp_path)
    keys = {role: (tmp_path / role / KEY_FILE).read_bytes() for role in Role}
    authority = (tmp_path / AUTHORITY_KEY).read_bytes()
    assert not make(tmp_path)
    assert (tmp_path / AUTHORITY_KEY).read_bytes() == authority
    assert all((tmp_path / role / KEY_FILE).read_bytes() != key for role, key in keys.items())
    assert {(tmp_path / role / KEY_FILE).stat().st_mode & 0o777 for role in Role} == {0o600}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (CA_FILE, b"none", "not a certificate"),
        (CERTIFICATE_FILE, b"", "not a certificate"),
        (KEY_FILE, b"none", "not a key"),
        (KEY_FILE, None, "not the key of tls.crt"),
    ],
)
def test_what_is_no_certificate_is_named(
    tmp_path: Path, file: str, content: bytes | None, said: str
) -> None:
    """gRPC would say that the address can't be bound, or nothing."""
    make(tmp_path)
    other = (tmp_path / Role.ADMIN / file).read_bytes()
    (tmp_path / Role.GATEWAY / file).write_bytes(other if content is None else content)
    with pytest.raises(ConfigError, match=f"tls_dir .*/gateway/{file}: {said}"):
        Tls.load(tmp_path, Role.GATEWAY)


@pytest.mark.parametrize(("days", "said"), [(-1, "expired at 20"), (10, "not valid before")])
def test_a_certificate_that_does_not_hold_now_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, said: str
) -> None:
    monkeypatch.setattr(authority, "_DAYS", 0 if days < 0 else days + 1)
    monkeypatch.setattr(authority, "_SKEW", datetime.timedelta(days=-days))
    make(tmp_path)
    with pytest.raises(ConfigError, match=f"{said}"):
        Tls.load(tmp_path, Role.GATEWAY)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls_dir .*/gateway/ca.crt: No such file"):
        Tls.load(tmp_path, Role.GATEWAY)
    assert Tls.load(None, Role.GATEWAY) is None
