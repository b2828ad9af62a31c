"""The containers' health check, against real servers."""

import asyncio
import http.server
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from precast.access.authority import make
from precast.rpc.healthcheck import failure
from precast.rpc.server import start_server
from precast.rpc.tls import Role, Tls
from precast.rpc.tls_files import CERTIFICATE_FILE, KEY_FILE
from tests.support.ports import free_port

pytestmark = pytest.mark.timeout(90)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def http_port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_http(http_port: int) -> None:
    assert failure(f"http://127.0.0.1:{http_port}/health") is None
    assert failure(f"http://127.0.0.1:{http_port}/ready") == "status 503"


def test_https(http_port: int, tmp_path: Path) -> None:
    """As a gateway with a certificate speaks it, whatever name the certificate has."""
    make(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    folder = tmp_path / Role.GATEWAY
    context.load_cert_chain(folder / CERTIFICATE_FILE, folder / KEY_FILE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_address[1]}/health"
        assert failure(url) is None
        assert _main(url.replace("https", "http"), PRECAST_HTTPS_CERTIFICATE="/x") == ""
        assert _main(url.replace("https", "http")) != ""
        server.shutdown()
    assert failure(f"https://127.0.0.1:{http_port}/health") is not None


def _main(url: str, **environment: str) -> str:
    """What the command says; nothing of a healthy server."""
    command = [sys.executable, "-m", "precast.rpc.healthcheck", url]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


@pytest.mark.asyncio
async def test_grpc() -> None:
    server = await start_server("127.0.0.1:0", [])
    url = f"grpc://127.0.0.1:{server.port}"
    assert await asyncio.to_thread(failure, url) is None
    await server.set_serving(False)
    assert await asyncio.to_thread(failure, url) == "not serving"
    await server.stop(0)


@pytest.mark.asyncio
async def test_grpc_with_certificates(tmp_path: Path) -> None:
    """As any role of the machine: this one has what a gateway has."""
    make(tmp_path / "all")
    tls = Tls.load(tmp_path / "all", Role.DECODE_WORKER)
    (tmp_path / "own").mkdir()
    (tmp_path / "all" / Role.GATEWAY).rename(tmp_path / "own" / Role.GATEWAY)
    server = await start_server("127.0.0.1:0", [], tls=tls)
    url = f"grpc://127.0.0.1:{server.port}"
    assert await asyncio.to_thread(failure, url, tls_dir=tmp_path / "own") is None
    assert "UNAVAILABLE" in str(await asyncio.to_thread(failure, url))
    assert "No such file" in str(await asyncio.to_thread(failure, url, tls_dir=tmp_path))
    await server.stop(0)


def test_redis(redis_url: str) -> None:
    assert failure(redis_url) is None


def test_redis_with_a_password(tmp_path: Path, redis_url: str) -> None:
    """Of a user, so that others of this server's clients need none."""
    with redis.Redis.from_url(redis_url) as client:
        client.acl_setuser("checker", enabled=True, passwords=["+p@ss word"], commands=["+@all"])
    file = tmp_path / "password"
    mine = redis_url.replace("redis://", "redis://checker@")
    file.write_text("p@ss word\n")
    assert failure(mine, redis_password_file=file) is None
    file.write_text("another\n")
    assert failure(mine, redis_password_file=file) == "no answer"
    file.write_text("\n")
    assert "must hold one line" in str(failure(mine, redis_password_file=file))


@pytest.mark.parametrize("scheme", ["http", "grpc", "redis"])
def test_nothing_there(scheme: str) -> None:
    assert failure(f"{scheme}://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("url", ["", "ftp://x", "127.0.0.1:80"])
def test_not_a_url(url: str) -> None:
    assert "must be" in str(failure(url))
