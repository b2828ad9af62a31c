"""``precast serve`` as a process, for tests: start, ask, break, stop."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.support import forked
from tests.support.capture import BUILD_DIR
from tests.support.http_load import Load
from tests.support.plain_http import PLAIN
from tests.support.ports import free_port

MODEL = "smollm2-135m-instruct"
RANK = "services.decode_worker.ranks.process"
STOP_DEADLINE_S = 30.0
NO_GRAPHS = "[compile-worker]\ncapture_timeout_s = 0.01\n"
"""A home's ``precast.toml`` where steps run eagerly: captures take time that other tests need."""


class Serve:
    """A running ``precast serve``."""

    def __init__(self, home: Path, flags: Sequence[str]) -> None:
        self.home = home
        self.port = free_port()
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        command = [sys.executable, "-m", "precast", "serve", f"--home={home}"]
        command += [f"--port={self.port}", "--compile-port=0", "--decode-port=0"]
        command += ["--metrics-port=0", *flags]
        ours = {k for k in os.environ if k.startswith("PRECAST_")} - {forked.ISA}
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment["PRECAST_BUILD_DIR"] = str(BUILD_DIR)
        environment["PRECAST_CAPTURE_IDLE"] = "false"  # other tests take what CPUs there are
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=home,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_line(self, part: str, deadline_s: float) -> str:
        """A line, earlier or to come, that has ``part`` in it; fails with all lines so far."""
        if found := next((line for line in self.lines if part in line), None):
            return found
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            try:
                line = self._queue.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                break
            if line is None:
                raise AssertionError(f"serve ended before {part!r}:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if part in line:
                return line
        raise AssertionError(f"no {part!r} in {deadline_s} s:\n" + "\n".join(self.lines))

    def complete(self, prompt: str = "The capital of France is", max_tokens: int = 8) -> str:
        answer = self.ask(prompt, max_tokens)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["text"])

    def ask(self, prompt: str, max_tokens: int, timeout_s: float = 60.0) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "temperature": 0}
        body |= {"max_tokens": max_tokens}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        return httpx.post(url, json=body, timeout=timeout_s, trust_env=False, verify=PLAIN)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def load(self, max_tokens: int) -> Load:
        """Completions that go on while in the ``with`` block."""
        url = f"http://127.0.0.1:{self.port}"
        prompt = "The capital of France is"
        return Load(
            url=url, model=MODEL, prompt=prompt, max_tokens=max_tokens, clients=3, pause_s=0.05
        )

    def service(self, word: str) -> psutil.Process:
        """The service whose command line has this word in it, or one of the ``rank`` processes."""
        for process in self.descendants():
            try:
                command = " ".join(process.cmdline())
                nested = process.ppid() != self.process.pid
            except psutil.NoSuchProcess:  # a compiler that has ended
                continue
            if (RANK in command) if word == "rank" else (word in command and not nested):
                return process
        raise AssertionError(f"no process of {word}")

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(signum)
        return self.process.wait(STOP_DEADLINE_S)


@contextmanager
def serving(home: Path, *flags: str) -> Iterator[Serve]:
    """A stack that is stopped, if need be by force, at the end."""
    stack = Serve(home, flags)
    try:
        yield stack
    finally:
        if stack.process.poll() is None:
            stack.process.kill()
            stack.process.wait()


def poll(check: Callable[[], bool], deadline_s: float, what: str) -> None:
    end = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.1)


def segments() -> set[str]:
    """Precast's shared-memory segments on this machine."""
    return {path.name for path in Path("/dev/shm").glob("precast*")}


def alive(process: psutil.Process) -> bool:
    """Whether it runs: one that has ended may wait for init to collect it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
