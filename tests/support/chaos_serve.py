"""What can happen to ``precast serve`` under load, one thing after another.

``python -m tests.support.chaos_serve [--rounds 3]`` kills and stops every process, makes Redis
refuse writes, empties it, fills the disk, and damages graphs and weights on disk, while clients
ask. Each request must end once, with the right text or with an error of OpenAI's shape; where only
Redis or the disk is at fault, none may fail. Prints, as JSON, seconds from each fault to the end of
the first request that was sent after it and succeeded; ends with 1 where that was too long.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import redis

from precast.models.importing.importer import import_model
from tests.support.http_load import check_outcomes
from tests.support.recovery import KINDS, SIGNALS, away, settle, too_slow
from tests.support.serve_stack import MODEL, Serve, serving

NAMESPACE = "PRECAST_CHAOS_NAMESPACE"
"""Set in the run that has a mount namespace of its own."""
HOME_SIZE = "3g"
FAULT_S = 6.0
"""How long Redis refuses writes, and the disk is full: longer than a lease lives."""
FLAGS = ("--batch-sizes=1,4", "--prefill-buckets=")
TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that happens, and what may come of it."""

    name: str
    happen: Callable[[Serve], float]
    """Makes it happen, and waits until requests succeed again; seconds that took."""
    may_fail: bool
    """Whether requests may end with an error."""
    may_lose: bool = False
    """Whether connections may break: the gateway itself ended."""


def process_faults() -> Iterator[Fault]:
    for kind in KINDS:
        for name, signum in SIGNALS.items():
            yield Fault(
                name=f"{kind} {name}",
                happen=lambda stack, kind=kind, signum=signum: away(stack, kind, signum)[1],
                may_fail=kind not in ("redis-server", "compile-worker"),
                may_lose=kind == "gateway",
            )


def _until_answered(stack: Serve, begun: float) -> float:
    assert "text" in stack.ask("One, two,", 1).json()["choices"][0]
    return time.monotonic() - begun


def _redis(stack: Serve) -> "redis.Redis":
    """By the port that it listens on: its command line changes while it starts."""
    [server] = [p for p in stack.descendants() if "redis-server" in p.name()]
    [port] = {c.laddr.port for c in server.net_connections() if c.status == psutil.CONN_LISTEN}
    return redis.Redis(port=port)


def refuse_writes(stack: Serve) -> float:
    client = _redis(stack)
    before = client.config_get("maxmemory")["maxmemory"]
    client.config_set("maxmemory", "1mb")
    begun = time.monotonic()
    try:
        while time.monotonic() < begun + FAULT_S:
            seconds = _until_answered(stack, time.monotonic())
        return seconds
    finally:
        client.config_set("maxmemory", before)


def empty_redis(stack: Serve) -> float:
    _redis(stack).flushall()
    return _until_answered(stack, time.monotonic())


def fill_disk(stack: Serve) -> float:
    filler = stack.home / "filler"
    try:
        write_until_full(filler)
        begun = time.monotonic()
        while time.monotonic() < begun + FAULT_S:
            seconds = _until_answered(stack, time.monotonic())
        return seconds
    finally:
        filler.unlink()


def write_until_full(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 24, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def _flip(path: Path) -> None:
    """Other bytes in the middle of a file, in place, with the times that it had."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(stat.st_size // 2)
        middle = file.read(64)
        file.seek(stat.st_size // 2)
        file.write(bytes(byte ^ 0x55 for byte in middle))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damage(pattern: str) -> Callable[[Serve], float]:
    """Damages what is kept on disk, then has the worker read it again."""

    def happen(stack: Serve) -> float:
        paths = sorted((stack.home / "cache").glob(pattern))
        assert paths, pattern
        for path in paths:
            _flip(path)
        return away(stack, "decode-worker", signal.SIGKILL)[1]

    return happen


FAULTS = (
    *process_faults(),
    Fault(name="redis refuses writes", happen=refuse_writes, may_fail=False),
    Fault(name="redis is emptied", happen=empty_redis, may_fail=False),
    Fault(name="disk is full", happen=fill_disk, may_fail=False),
    Fault(name="graphs are damaged", happen=damage("graphs/**/graph.pt2"), may_fail=True),
    Fault(
        name="packed weights are damaged",
        happen=damage("weights/**/layer-3.safetensors"),
        may_fail=True,
    ),
)


def run(home: Path, rounds: int, only: str = "") -> dict[str, list[float]]:
    """Seconds away, by fault. Raises AssertionError where a request did not end as it must."""
    found: dict[str, list[float]] = {}
    texts: set[str] = set()
    with serving(home, *FLAGS) as stack:
        stack.wait_line("captures 2 of 2", 300)
        for _ in range(rounds):
            for fault in FAULTS:
                if only in fault.name:
                    seconds = _under_load(stack, fault, texts)
                    found.setdefault(fault.name, []).append(round(seconds, 2))
        assert stack.stop() == 0
    return found


def _under_load(stack: Serve, fault: Fault, texts: set[str]) -> float:
    settle(stack)
    with stack.load(max_tokens=TOKENS) as load:
        time.sleep(0.5)
        seconds = fault.happen(stack)
        good, end = load.good(), time.monotonic() + 60
        while load.good() < good + 3:
            assert time.monotonic() < end, f"{fault.name}: requests don't finish again"
            time.sleep(0.05)
    check_outcomes(load.outcomes, may_lose=fault.may_lose)
    failed = [outcome for outcome in load.outcomes if not outcome.finished]
    assert fault.may_fail or not failed, (fault.name, failed)
    texts.update(outcome.text for outcome in load.outcomes if outcome.finished)
    assert len(texts) == 1, (fault.name, texts)
    print(f"{fault.name}: {seconds:.2f} s, {len(failed)} failed", file=sys.stderr, flush=True)
    return seconds


@contextmanager
def small_disk() -> Iterator[Path]:
    """A home folder on a disk of its own, which can be filled."""
    with tempfile.TemporaryDirectory(prefix="precast-chaos-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={HOME_SIZE}", "chaos", folder]
        subprocess.run(mount, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def in_namespace(arguments: list[str]) -> int:
    """The same program, where it may mount; the exit code."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
    command = [*unshare, sys.executable, "-m", "tests.support.chaos_serve", *arguments]
    return subprocess.run(command, env={**os.environ, NAMESPACE: "1"}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.support.chaos_serve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="faults with this in their name")
    parser.add_argument("--model", default=MODEL, help="a folder, or the name of a built-in model")
    arguments = parser.parse_args()
    if NAMESPACE not in os.environ:
        return in_namespace(sys.argv[1:])
    with small_disk() as home:
        import_model(arguments.model, home / "models", report=lambda _stage: None)
        found = run(home, arguments.rounds, arguments.only)
    print(json.dumps(found, indent=1))
    print("\n".join(late := too_slow(found)), file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
