"""Health checks for containers: ``python -m precast.rpc.healthcheck URL``; exit code 0 is healthy.

URL is ``http://host:port/path`` (healthy: status 200), ``grpc://host:port`` (the standard health
service says SERVING) or ``redis://host:port`` (it answers a ping). Says why not in one line.
"""

import http.client
import sys
from typing import Final
from urllib.parse import SplitResult, urlsplit

TIMEOUT_S: Final = 3.0


def failure(url: str) -> str | None:
    """Why the service at ``url`` is not healthy, or None if it is."""
    parts = urlsplit(url)
    checks = {"http": _http, "grpc": _grpc, "redis": _redis}
    if parts.scheme not in checks or not parts.hostname:
        return "must be an http://, grpc:// or redis:// URL"
    return checks[parts.scheme](parts)


def _http(url: SplitResult) -> str | None:
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=TIMEOUT_S)
    try:
        connection.request("GET", url.path or "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error)
    finally:
        connection.close()
    return None if status == 200 else f"status {status}"


def _grpc(url: SplitResult) -> str | None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(url.netloc) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            return str(error.code())
    serving = health_pb2.HealthCheckResponse.SERVING
    return None if answer.status == serving else "not serving"


def _redis(url: SplitResult) -> str | None:
    from precast.system.redis_server import answers

    return None if answers(url.geturl(), TIMEOUT_S) else "no answer"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m precast.rpc.healthcheck URL")
    reason = failure(sys.argv[1])
    if reason is not None:
        sys.exit(f"{sys.argv[1]}: {reason}")


if __name__ == "__main__":
    main()
