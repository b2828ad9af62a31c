"""The gateway over TLS."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from precast.access.authority import make
from precast.cli.status import Observer, Status
from precast.rpc.tls import Role
from precast.rpc.tls_files import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from services.gateway.http.certificate import Certificate
from tests.support.command import precast
from tests.support.gateway_stack import Gateway, eventually, running_stack

ASK = {"model": "tiny", "prompt": "the fox", "max_tokens": 3}


def test_clients_that_trust_the_authority_are_served(redis_url: str, tmp_path: Path) -> None:
    make(tmp_path / "tls")
    role = tmp_path / "tls" / Role.GATEWAY
    files = {"https_certificate": role / CERTIFICATE_FILE, "https_key": role / KEY_FILE}
    with running_stack(redis_url, tmp_path) as stack:
        stack.worker()
        gateway = stack.gateway(
            authority=role / CA_FILE, **{name: str(path) for name, path in files.items()}
        )
        answer = gateway.post("/v1/completions", json=ASK)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 3)
        assert asyncio.run(seen_by_serve(redis_url, gateway.url)).ready
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(gateway.url + "/health", timeout=30)
        plain = httpx.post(gateway.url.replace("https", "http") + "/v1/completions", json=ASK)
        assert (plain.status_code, "https://" in plain.json()["error"]["message"]) == (400, True)


async def seen_by_serve(redis_url: str, gateway_url: str) -> Status:
    observer = Observer([], redis_url, gateway_url)
    try:
        return await observer.look()
    finally:
        await observer.close()


def test_a_new_certificate_is_shown_to_new_clients_only(redis_url: str, tmp_path: Path) -> None:
    """Nobody is cut off."""
    make(tmp_path / "old")
    make(tmp_path / "new")
    old, new, used = (tmp_path / name / Role.GATEWAY for name in ("old", "new", "used"))
    shutil.copytree(old, used)
    files = {"https_certificate": used / CERTIFICATE_FILE, "https_key": used / KEY_FILE}
    settings = {name: str(path) for name, path in files.items()}
    with running_stack(redis_url, tmp_path) as stack:
        stack.worker(step_ms=1)
        gateway = stack.gateway(authority=old / CA_FILE, **settings)
        context = ssl.create_default_context(cafile=old / CA_FILE)
        body = {**ASK, "prompt": "!slow", "max_tokens": 35, "stream": True}
        with httpx.stream("POST", f"{gateway.url}/v1/completions", json=body, verify=context) as s:
            lines = s.iter_lines()
            next(lines)
            for file in (CERTIFICATE_FILE, KEY_FILE):
                shutil.copy(new / file, used)
            gateway.authority = new / CA_FILE
            eventually(lambda: answers(gateway))
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_certificate_that_does_not_fit_its_key_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "old")
    make(tmp_path / "new")
    used, new = (tmp_path / name / Role.GATEWAY for name in ("old", "new"))
    certificate = Certificate(used / CERTIFICATE_FILE, used / KEY_FILE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(used / CERTIFICATE_FILE, used / KEY_FILE)
    before = shown_by(context)
    key = (used / KEY_FILE).read_bytes()
    (used / KEY_FILE).unlink()
    certificate.renew(context)
    shutil.copy(new / CERTIFICATE_FILE, used)
    (used / KEY_FILE).write_bytes(key)
    certificate.renew(context)
    assert shown_by(context) == before
    shutil.copy(new / KEY_FILE, used)
    certificate.renew(context)
    assert shown_by(context) == ssl.PEM_cert_to_DER_cert((new / CERTIFICATE_FILE).read_text())


def shown_by(server: ssl.SSLContext) -> bytes | None:
    """The certificate that clients see."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(back, there)
    theirs = server.wrap_bio(there, back, server_side=True)
    for side in (ours, theirs, ours):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return ours.getpeercert(binary_form=True)


def answers(gateway: Gateway) -> bool:
    try:
        return gateway.get("/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_who_does_not_shake_hands_holds_up_nobody(redis_url: str, tmp_path: Path) -> None:
    """More than there may be open files: the oldest make way."""
    make(tmp_path / "tls")
    role = tmp_path / "tls" / Role.GATEWAY
    files = {"https_certificate": role / CERTIFICATE_FILE, "https_key": role / KEY_FILE}
    with running_stack(redis_url, tmp_path) as stack, ExitStack() as held:
        gateway = stack.gateway(
            wait_for=0,
            authority=role / CA_FILE,
            max_connections=20,
            **{name: str(path) for name, path in files.items()},
        )
        psutil.Process(gateway.process.pid).rlimit(psutil.RLIMIT_NOFILE, (168, 168))
        for _ in range(200):
            held.enter_context(socket.create_connection(("127.0.0.1", gateway.port)))
        began = time.monotonic()
        assert gateway.get("/health").status_code == 200
        assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--https-key={folder}/none"], "need each other"),
        (["--https-key={folder}/none", "--https-certificate={folder}/none"], "No such file"),
        (["--https-key={folder}/x", "--https-certificate={folder}/x"], "https_certificate"),
    ],
)
def test_what_is_wrong_is_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no certificate")
    given = [flag.format(folder=tmp_path) for flag in flags]
    done = precast("gateway", f"--home={tmp_path}", "--port=0", "--metrics-port=0", *given)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("precast: ")
    assert said in last
    assert "Traceback" not in done.stderr
