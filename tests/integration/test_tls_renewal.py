"""Certificates of gRPC that are renewed while services run: connections that begin then show the
new ones, and what can't be used of them changes nothing."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from precast.access import authority
from precast.access.authority import AUTHORITY_KEY, make
from precast.rpc.server import open_channel, start_server
from precast.rpc.tls import Role, Tls
from precast.rpc.tls_files import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from tests.support.decode_worker import decode_worker
from tests.support.gateway_stack import Stack, eventually
from tests.support.ports import free_port

DEADLINE_S = 15
BODY = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}


def loaded(folder: Path, role: Role = Role.ADMIN) -> Tls:
    tls = Tls.load(folder, role)
    assert tls is not None
    return tls


def rotate(folder: Path) -> None:
    """Another authority, and its certificates for all."""
    (folder / AUTHORITY_KEY).unlink()
    assert make(folder)


async def answers(address: str, tls: Tls) -> bool:
    """On a new connection."""
    async with open_channel(address, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.aio.AioRpcError:
            return False
    return True


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[str]:
    server = await start_server("127.0.0.1:0", [], tls=loaded(folder, Role.DECODE_WORKER))
    yield f"127.0.0.1:{server.port}"
    await server.stop(0)


async def test_a_gateway_and_a_worker_go_over_to_another_authority(
    tmp_path: Path, tiny_home: Path, tiny_redis: str
) -> None:
    certificates, old = tmp_path / "now", tmp_path / "old"
    make(old)
    certificates.symlink_to(old)
    stranger, friend = loaded(old), loaded(certificates)
    address = f"127.0.0.1:{free_port()}"
    settings = {"tls_dir": certificates, "batch_sizes": "1", "address": address, "tls": friend}
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    try:
        with decode_worker(tiny_home, tiny_redis, "tiny", **settings):  # type: ignore[arg-type]
            gateway = stack.gateway(tls_dir=str(certificates))
            assert gateway.post("/v1/completions", json=BODY).status_code == 200
            make(tmp_path / "new")
            certificates.unlink()
            certificates.symlink_to(tmp_path / "new")
            assert not await answers(address, stranger)
            assert await answers(address, friend)
            assert gateway.post("/v1/completions", json=BODY).status_code == 200
        with decode_worker(tiny_home, tiny_redis, "tiny", **settings):  # type: ignore[arg-type]
            eventually(lambda: gateway.workers() == 1)
            assert gateway.post("/v1/completions", json=BODY).status_code == 200
    finally:
        for process in stack.started:
            process.kill()
            process.wait()


async def test_a_certificate_is_renewed_after_it_has_expired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority, "_DAYS", 2 / (24 * 3600))
    make(tmp_path)
    async with served(tmp_path) as address:
        caller = loaded(tmp_path)
        assert await answers(address, caller)
        end = time.monotonic() + DEADLINE_S
        while await answers(address, caller):
            assert time.monotonic() < end
        monkeypatch.undo()
        make(tmp_path)
        assert await answers(address, caller)


@pytest.mark.parametrize("name", [CA_FILE, CERTIFICATE_FILE, KEY_FILE])
@pytest.mark.parametrize("what", ["half", "another's", "away"])
async def test_what_is_half_written_is_not_used_and_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, what: str
) -> None:
    make(tmp_path / "other")
    make(tmp_path / "own")
    file = tmp_path / "own" / Role.DECODE_WORKER / name
    async with served(tmp_path / "own") as address:
        caller = loaded(tmp_path / "own")
        whole = file.read_bytes()
        if what == "half":
            first = whole if name == CA_FILE else b""  # of two authorities
            file.write_bytes(first + whole[: len(whole) // 2])
        elif what == "away":
            file.unlink()
        else:
            file.write_bytes((tmp_path / "other" / Role.DECODE_WORKER / name).read_bytes())
        used = name == CA_FILE and what == "another's"
        assert [await answers(address, caller) for _ in range(3)] == [not used] * 3
        assert "".join(capfd.readouterr()).count("new certificate not used") == (not used)
        file.write_bytes(whole)
        assert await answers(address, caller)
        rotate(tmp_path / "own")
        assert await answers(address, caller)
