"""The containers' health check, against real servers."""

import asyncio
import http.server
import threading
from collections.abc import Iterator

import pytest

from precast.rpc.healthcheck import failure
from precast.rpc.server import start_server
from tests.support.ports import free_port

pytestmark = pytest.mark.timeout(30)


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


@pytest.mark.asyncio
async def test_grpc() -> None:
    server = await start_server("127.0.0.1:0", [])
    url = f"grpc://127.0.0.1:{server.port}"
    assert await asyncio.to_thread(failure, url) is None
    await server.set_serving(False)
    assert await asyncio.to_thread(failure, url) == "not serving"
    await server.stop(0)


def test_redis(redis_url: str) -> None:
    assert failure(redis_url) is None


@pytest.mark.parametrize("scheme", ["http", "grpc", "redis"])
def test_nothing_there(scheme: str) -> None:
    assert failure(f"{scheme}://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("url", ["", "ftp://x", "127.0.0.1:80"])
def test_not_a_url(url: str) -> None:
    assert "must be" in str(failure(url))
