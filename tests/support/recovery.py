"""How long ``precast serve`` is away when one of its processes is killed or stopped.

``python -m tests.support.recovery [--runs 3] [--model-home HOME]`` prints seconds as JSON: from the
signal to the end of the first request that was sent after it and succeeded; ``noticed``: until the
process was gone. Ends with 1 where one took longer than ``LIMITS_S`` allows.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from precast.models.importing.importer import import_model
from tests.support.serve_stack import MODEL, Serve, alive, serving

KINDS = ("rank", "decode-worker", "gateway", "compile-worker", "redis-server")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
LIMITS_S = {"rank": 3.0, "decode-worker": 5.0, "gateway": 2.0}
"""For killed processes."""
OTHERS_LIMIT_S = 2.0
"""No request needs them."""
HUNG_LIMIT_S = 15.0
DEADLINE_S = 60.0
POLL_S = 0.05


def away(stack: Serve, kind: str, signum: signal.Signals) -> tuple[float, float]:
    """Seconds until the process was gone, and until a request succeeded after that."""
    victim = stack.service(kind)
    begun = time.monotonic()
    os.kill(victim.pid, signum)
    while alive(victim):
        assert time.monotonic() - begun < DEADLINE_S, f"{kind} was never replaced"
        time.sleep(0.01)
    noticed = time.monotonic() - begun
    while not _answers(stack):
        assert time.monotonic() - begun < DEADLINE_S, f"no answer after {kind} was gone"
        time.sleep(POLL_S)
    return noticed, time.monotonic() - begun


def _answers(stack: Serve) -> bool:
    try:
        return stack.ask("One, two,", 1, timeout_s=DEADLINE_S).status_code == 200
    except httpx.TransportError:
        return False


def settle(stack: Serve) -> None:
    """Until everything runs, and has for a moment."""
    end = time.monotonic() + DEADLINE_S
    while not (_answers(stack) and all(_runs(stack, kind) for kind in KINDS)):
        assert time.monotonic() < end, "a process is missing"
        time.sleep(0.2)
    time.sleep(1.5)


def _runs(stack: Serve, kind: str) -> bool:
    try:
        return stack.service(kind).is_running()
    except (AssertionError, psutil.NoSuchProcess):
        return False


def measure(home: Path, runs: int) -> dict[str, list[float]]:
    """Seconds away, by process and signal."""
    found: dict[str, list[float]] = {}
    with serving(home, "--batch-sizes=1", "--prefill-buckets=") as stack:
        stack.wait_line("captures 1 of 1", 300)
        for _ in range(runs):
            for kind in KINDS:
                for name, signum in SIGNALS.items():
                    settle(stack)
                    noticed, back = away(stack, kind, signum)
                    found.setdefault(f"{kind} {name}", []).append(round(back, 2))
                    found.setdefault(f"{kind} {name}, noticed", []).append(round(noticed, 2))
        assert stack.stop() == 0
    return found


def too_slow(found: dict[str, list[float]]) -> list[str]:
    """A line for each fault that took longer than it may, on a machine that does nothing else."""
    lines = []
    for kind in KINDS:
        limits = {"killed": LIMITS_S.get(kind, OTHERS_LIMIT_S), "stopped": HUNG_LIMIT_S}
        for name, limit in limits.items():
            worst = max(found.get(f"{kind} {name}", [0.0]))
            if worst > limit:
                lines.append(f"{kind} {name}: {worst:g} s, {limit:g} allowed")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.support.recovery")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", default=MODEL, help="a folder, or the name of a built-in model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(
        prefix="precast-recovery-", ignore_cleanup_errors=True
    ) as home:
        import_model(arguments.model, Path(home) / "models", report=lambda _stage: None)
        found = measure(Path(home), arguments.runs)
    print(json.dumps(found, indent=1))
    print("\n".join(late := too_slow(found)), file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
