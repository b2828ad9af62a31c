"""The gateway over TLS."""

from pathlib import Path

import httpx
import pytest

from precast.access.authority import make
from precast.rpc.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Role
from tests.support.command import precast
from tests.support.gateway_stack import running_stack

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
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(gateway.url + "/health", timeout=5)
        with pytest.raises(httpx.HTTPError):
            httpx.get(gateway.url.replace("https", "http") + "/health", timeout=5)


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
