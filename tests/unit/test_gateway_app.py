"""The gateway's app without a server or workers: what is refused before a model matters."""

import asyncio
import errno
import gzip
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from precast.config.settings import GatewaySettings, load_settings
from precast.errors import ConfigError
from services.gateway.app import create_app
from services.gateway.main import bind

PRIVATE = 9
BODY = {"model": "m", "prompt": "p"}
JSON = {"content-type": "application/json"}


@pytest.fixture
def options() -> dict[str, Any]:
    return {}


@pytest.fixture
async def client(tmp_path: Path, options: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    settings = load_settings(GatewaySettings, home=tmp_path, max_body_bytes=10_000, **options)
    transport = httpx.ASGITransport(app=create_app(settings, PRIVATE))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway:8000") as client:
        yield client


async def metrics(client: httpx.AsyncClient) -> str:
    return (await client.get(f"http://gateway:{PRIVATE}/metrics")).text


def error_of(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


# --- bodies ---


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(json.dumps(BODY).encode()),
        gzip.compress(b'{"model": "m",', mtime=0) + gzip.compress(b'"prompt": "p"}'),
    ],
    ids=["one member", "two members"],
)
@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZip"])
async def test_gzip_is_unpacked(client: httpx.AsyncClient, packed: bytes, encoding: str) -> None:
    headers = {**JSON, "content-encoding": encoding}
    answer = await client.post("/v1/completions", content=packed, headers=headers)
    assert error_of(answer, 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (gzip.compress(b"x" * 10_001, mtime=0), 413, "larger than 10000 bytes"),
        (gzip.compress(b"0" * 50_000_000, mtime=0), 413, "larger than 10000 bytes"),
        (gzip.compress(b"", mtime=0) * 1000, 413, "larger than 10000 bytes"),
        (b"{}", 400, "not valid gzip"),
        (b"", 400, "ends early"),
        (gzip.compress(b"{}", mtime=0)[:-4], 400, "ends early"),
        (gzip.compress(b"{}", mtime=0)[:-4] + b"abcd", 400, "not valid gzip"),
        (gzip.compress(b"{}", mtime=0) + b"more", 400, "not valid gzip"),
    ],
)
async def test_what_gzip_may_not_do(
    client: httpx.AsyncClient, content: bytes, status: int, reason: str
) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    async with asyncio.timeout(1.5):  # nothing more is waited for
        answer = await client.post("/v1/completions", content=content, headers=headers)
    assert reason in error_of(answer, status)["message"]


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "zstd"])
async def test_other_encodings_are_refused(client: httpx.AsyncClient, encoding: str) -> None:
    headers = {**JSON, "content-encoding": encoding}
    answer = await client.post("/v1/completions", content=b"{}", headers=headers)
    assert encoding in error_of(answer, 415)["message"]
    assert answer.headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"content-type": "application/json; charset=utf-8"}, 404),
        ({"content-type": "application/vnd.x+json"}, 404),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        ({"origin": "https://evil.example"}, 415),
        ({"origin": "https://evil.example", "content-type": "text/plain"}, 415),
    ],
)
async def test_content_types(
    client: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    """A page of another site can't send what is accepted without a preflight."""
    content = json.dumps(BODY).encode()
    answer = await client.post("/v1/completions", content=content, headers=headers)
    error_of(answer, status)


@pytest.mark.parametrize("options", [{"cors_origins": "https://app.example"}])
async def test_with_cors_a_body_needs_its_content_type(client: httpx.AsyncClient) -> None:
    content = json.dumps(BODY).encode()
    assert error_of(await client.post("/v1/completions", content=content), 415)
    answer = await client.post("/v1/completions", content=content, headers=JSON)
    assert error_of(answer, 404)


# --- browsers ---

PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_cors_is_closed_by_default(client: httpx.AsyncClient) -> None:
    assert (await client.options("/v1/chat/completions", headers=PREFLIGHT)).status_code == 405
    answer = await client.get("/v1/models", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"cors_origins": "https://app.example,http://localhost:3000"}, "https://app.example"),
        ({"cors_origins": "*"}, "*"),
    ],
)
async def test_cors(client: httpx.AsyncClient, allowed: str) -> None:
    answer = await client.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == allowed
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    private = {**PREFLIGHT, "access-control-request-private-network": "true"}
    answer = await client.options("/v1/chat/completions", headers=private)
    assert answer.headers["access-control-allow-private-network"] == "true"
    for refused in (
        await client.post("/v1/completions", json=BODY, headers={"origin": PREFLIGHT["origin"]}),
        await client.post(
            "/v1/completions",
            content=b"x" * 20_000,
            headers={**JSON, "origin": "https://app.example"},
        ),
    ):
        assert refused.headers["access-control-allow-origin"] == allowed
    strange = {**PREFLIGHT, "origin": "https://evil.example"}
    answer = await client.options("/v1/chat/completions", headers=strange)
    assert answer.headers.get("access-control-allow-origin") == ("*" if allowed == "*" else None)


@pytest.mark.parametrize("origins", ["app.example", "https://app.example/", "https://a.b/c", "*,x"])
def test_wrong_origins_are_refused(tmp_path: Path, origins: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins"):
        load_settings(GatewaySettings, home=tmp_path, cors_origins=origins)


# --- metrics and reference ---


async def test_metrics_and_docs_are_not_on_the_public_port(client: httpx.AsyncClient) -> None:
    for path in ("/metrics", "/docs", "/redoc"):
        error_of(await client.get(path), 404)
    private = f"http://gateway:{PRIVATE}"
    assert "gateway_requests_total" in await metrics(client)
    assert "swagger" in (await client.get(f"{private}/docs")).text
    assert "/v1/completions" in (await client.get(f"{private}/openapi.json")).json()["paths"]
    error_of(await client.get(f"{private}/v1/models"), 404)
    assert (await client.get(f"{private}/health")).status_code == 200


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
async def test_refusals_are_counted_under_their_endpoint(
    client: httpx.AsyncClient, endpoint: str
) -> None:
    content = b"x" * 20_000
    error_of(await client.post(endpoint, content=content, headers=JSON), 413)
    error_of(await client.post(f"{endpoint}/", content=content, headers=JSON), 413)
    line = f'gateway_requests_total{{endpoint="{endpoint}",status="413"}} 2.0'
    assert line in await metrics(client)


@pytest.mark.parametrize("options", [{"max_in_flight": 1}])
async def test_a_slow_body_takes_no_place_of_others(client: httpx.AsyncClient) -> None:
    sending = asyncio.Event()
    done = asyncio.Event()

    async def slow_body() -> AsyncIterator[bytes]:
        sending.set()
        await done.wait()
        yield json.dumps(BODY).encode()

    post = client.post("/v1/completions", content=slow_body(), headers=JSON)
    first = asyncio.create_task(post)
    await sending.wait()
    error_of(await client.post("/v1/completions", json=BODY), 404)
    done.set()
    error_of(await first, 404)
    assert "gateway_in_flight_requests 0.0" in await metrics(client)


async def test_large_bodies_that_do_not_end_keep_no_small_ones_out(tmp_path: Path) -> None:
    """Sixteen of the largest take all the memory that there is for bodies."""
    settings = load_settings(GatewaySettings, home=tmp_path, max_body_bytes=100_000)
    done = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b" " * 99_000
        await done.wait()

    transport = httpx.ASGITransport(app=create_app(settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway:8000") as client:
        posts = [client.post("/v1/completions", content=endless(), headers=JSON) for _ in range(20)]
        sending = [asyncio.create_task(post) for post in posts]
        large = json.dumps(BODY | {"prompt": "x" * 95_000}).encode()
        async with asyncio.timeout(10):
            while (refused := await post_json(client, large)).status_code != 429:
                await asyncio.sleep(0)
        assert "too much memory" in error_of(refused, 429)["message"]
        error_of(await client.post("/v1/completions", json=BODY), 404)
        done.set()
        await asyncio.gather(*sending)
        error_of(await post_json(client, large), 404)


async def post_json(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await client.post("/v1/completions", content=content, headers=JSON)


@pytest.mark.parametrize("options", [{"max_in_flight": 1, "model_host": "nobody-is-here"}])
async def test_too_many_are_counted_under_their_endpoint(client: httpx.AsyncClient) -> None:
    first = asyncio.create_task(client.post("/v1/completions", json=BODY))  # waits for its model
    async with asyncio.timeout(5):
        while "gateway_in_flight_requests 1.0" not in await metrics(client):
            await asyncio.sleep(0.01)
    for path in ("/v1/chat/completions", "/v1/nothing"):
        refused = await client.post(path, json=BODY)
        assert error_of(refused, 429)["code"] == "overloaded"
        assert refused.headers["retry-after"]
    first.cancel()
    text = await metrics(client)
    assert 'gateway_requests_total{endpoint="/v1/chat/completions",status="429"} 1.0' in text
    assert 'gateway_requests_total{endpoint="other",status="429"} 1.0' in text


@pytest.mark.parametrize("options", [{"model_host": "nobody-is-here"}])
async def test_who_starts_models_is_away(client: httpx.AsyncClient) -> None:
    """Clients try again after a 503; a 404 they take for good."""
    async with asyncio.timeout(5):
        answer = await client.post("/v1/completions", json={"prompt": "p"})
        assert error_of(answer, 503)["code"] == "worker_unavailable"
        assert answer.headers["retry-after"]
        assert (await client.get("/v1/models")).json()["data"] == []


# --- addresses ---


@pytest.mark.parametrize("host", ["[::1]", "::1"])
def test_ipv6_addresses_may_stand_in_brackets(host: str) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        if probe.connect_ex(("::1", 9)) not in (0, errno.ECONNREFUSED):
            pytest.skip("this machine has no IPv6")
    with bind("", host, 0) as listener:
        assert listener.getsockname()[0] == "::1"


@pytest.mark.parametrize(("prefix", "name"), [("", "port"), ("metrics_", "metrics_port")])
def test_a_port_in_use_is_named(prefix: str, name: str) -> None:
    with bind("", "127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{name} {port}: Address already in use"):
            bind(prefix, "127.0.0.1", port)
