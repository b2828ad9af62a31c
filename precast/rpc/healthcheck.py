"""Health checks for containers: ``python -m precast.rpc.healthcheck URL``; exit code 0 is healthy.

URL is ``http://host:port/path`` (healthy: status 200), ``grpc://host:port`` (the standard health
service says SERVING) or ``redis://host:port`` (it answers a ping). Says why not in one line.
``https://`` is for a gateway with a certificate, of which nothing is checked: its name is not
that of this machine's loopback.

``PRECAST_TLS_DIR``, ``PRECAST_HTTPS_CERTIFICATE`` (``http://`` is ``https://`` then) and
``PRECAST_REDIS_PASSWORD_FILE`` count as for the services. Settings are not loaded for them: this
runs every few seconds.
"""

import functools
import http.client
import os
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    import grpc

TIMEOUT_S: Final = 3.0


def failure(
    url: str, *, tls_dir: Path | None = None, redis_password_file: Path | None = None
) -> str | None:
    """Why the service at ``url`` is not healthy, or None if it is."""
    parts = urlsplit(url)
    checks: dict[str, Callable[[SplitResult], str | None]] = {
        "http": _http,
        "https": _http,
        "grpc": functools.partial(_grpc, tls_dir=tls_dir),
        "redis": functools.partial(_redis, password_file=redis_password_file),
    }
    if parts.scheme not in checks or not parts.hostname:
        return "must be an http://, https://, grpc:// or redis:// URL"
    return checks[parts.scheme](parts)


def _http(url: SplitResult) -> str | None:
    connection = _connection(url)
    try:
        connection.request("GET", url.path or "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error)
    finally:
        connection.close()
    return None if status == 200 else f"status {status}"


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    assert url.hostname is not None
    if url.scheme == "http":
        return http.client.HTTPConnection(url.hostname, url.port or 80, timeout=TIMEOUT_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    port = url.port or 443
    return http.client.HTTPSConnection(url.hostname, port, timeout=TIMEOUT_S, context=context)


def _grpc(url: SplitResult, tls_dir: Path | None) -> str | None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from precast.errors import ConfigError

    try:
        opened = _channel(url.netloc, tls_dir)
    except ConfigError as error:
        return str(error)
    with opened as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            return str(error.code())
    serving = health_pb2.HealthCheckResponse.SERVING
    return None if answer.status == serving else "not serving"


def _channel(address: str, tls_dir: Path | None) -> "grpc.Channel":
    import grpc

    from precast.rpc.tls import NAME, Tls

    tls = None if tls_dir is None else Tls.of_this_machine(tls_dir)
    if tls is None:
        return grpc.insecure_channel(address)
    named = [("grpc.ssl_target_name_override", NAME)]
    return grpc.secure_channel(address, tls.of_channel(), options=named)


def _redis(url: SplitResult, password_file: Path | None) -> str | None:
    from precast.system.redis_password import password_in, with_password
    from precast.system.redis_server import answers

    whole = url.geturl()
    try:
        whole = with_password(whole, password_in(password_file)) if password_file else whole
    except ValueError as error:
        return str(error)
    return None if answers(whole, TIMEOUT_S) else "no answer"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m precast.rpc.healthcheck URL")
    url = sys.argv[1]
    if os.environ.get("PRECAST_HTTPS_CERTIFICATE") and url.startswith("http://"):
        url = url.replace("http", "https", 1)
    reason = failure(
        url,
        tls_dir=_path("PRECAST_TLS_DIR"),
        redis_password_file=_path("PRECAST_REDIS_PASSWORD_FILE"),
    )
    if reason is not None:
        sys.exit(f"{sys.argv[1]}: {reason}")


def _path(variable: str) -> Path | None:
    named = os.environ.get(variable)
    return Path(named) if named else None


if __name__ == "__main__":
    main()
