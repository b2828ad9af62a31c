"""``serve --models-on-demand``: ten models in the memory of three, and from cold to a first token.

    python -m bench.on_demand [--rounds 3] [--starts 5]

Ten tiny models of different architectures are asked round robin by four clients. Then the demo
model is asked while it sleeps, again and again. Memory is what the models' processes have resident:
added up (RSS, which counts what forks share once for each), and with shared pages divided by those
that share them (PSS).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import psutil
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from precast.models.importing.importer import import_model
from tests.support.architectures import write_model
from tests.support.processes import words
from tests.support.serve_stack import Serve, poll, serving

DEMO: Final = "smollm2-135m-instruct"
ARCHITECTURES: Final = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3"),
    *("phi3", "smollm3", "olmo2", "granite", "mixtral"),
)
CLIENTS: Final = 4
MEMORY_MB: Final = 3 * 768 + 64
"""A tiny model counts 768 MiB for its processes, and little more."""
READY_S: Final = 120.0
EAGER: Final = "[compile-worker]\ncapture_timeout_s = 0.01\n"
"""Captures would take what processors there are."""


@dataclass(kw_only=True)
class Memory:
    """The most that was seen of the models' processes, MiB."""

    rss: float = 0.0
    pss: float = 0.0
    workers: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def watch(self, stack: Serve) -> None:
        while not self._ended.wait(0.1):
            leaders = [one for one in psutil.Process(stack.process.pid).children() if _leads(one)]
            found = [full for leader in leaders for full in _memory(leader)]
            self.workers = max(self.workers, len(leaders))
            self.rss = max(self.rss, sum(rss for rss, _ in found))
            self.pss = max(self.pss, sum(pss for _, pss in found))

    @contextmanager
    def watching(self, stack: Serve) -> Iterator[None]:
        watcher = threading.Thread(target=self.watch, args=[stack])
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            watcher.join()


def _leads(process: psutil.Process) -> bool:
    return "decode-worker" in words(process.pid)


def _memory(leader: psutil.Process) -> list[tuple[float, float]]:
    """RSS and PSS of a worker's processes, MiB."""
    found = []
    try:
        for process in (leader, *leader.children(recursive=True)):
            full = process.memory_full_info()
            found.append((full.rss / 2**20, full.pss / 2**20))
    except psutil.NoSuchProcess:
        pass
    return found


def write_tokenizer(folder: Path) -> None:
    """Of printable ASCII, which fits into the tiny models' vocabulary."""
    letters = [chr(code) for code in range(33, 127)]
    tokenizer = Tokenizer(
        tokenizer_models.BPE(vocab={x: i for i, x in enumerate([*letters, "Ġ"])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def url(stack: Serve) -> str:
    return f"http://127.0.0.1:{stack.port}/v1/completions"


def ask(stack: Serve, model: str) -> int:
    body = {"model": model, "prompt": "the sea", "max_tokens": 8, "temperature": 0}
    return httpx.post(url(stack), json=body, timeout=READY_S, trust_env=False).status_code


def take_turns(home: Path, rounds: int, console: Console) -> bool:
    """Whether every request was answered within the bound."""
    for name in ARCHITECTURES:
        write_tokenizer(write_model(home / "models" / name, name))
    (home / "precast.toml").write_text(EAGER)
    flags = ("--models-on-demand", f"--models-memory-mb={MEMORY_MB}", "--quantization=none")
    with serving(home, *flags, "--batch-sizes=1,4", "--prefill-buckets=") as stack:
        stack.wait_line("Precast serves", READY_S)
        memory, begun = Memory(), time.monotonic()
        order = [name for _ in range(rounds) for name in ARCHITECTURES]
        with memory.watching(stack), ThreadPoolExecutor(CLIENTS) as clients:
            answers = Counter(clients.map(lambda name: ask(stack, name), order))
        took = time.monotonic() - begun
        stack.stop()
        starts = sum(
            path.read_text().count("decode worker ready") for path in (home / "logs").glob("*.log")
        )
    console.print(
        f"{len(order)} requests to {len(ARCHITECTURES)} models by {CLIENTS} clients: "
        f"{dict(answers)} in {took:.1f} s, {starts} starts; at most {memory.workers} workers, "
        f"RSS {memory.rss:.0f} MiB, PSS {memory.pss:.0f} MiB of {MEMORY_MB} MiB"
    )
    return set(answers) == {200} and memory.rss <= MEMORY_MB


def first_token(stack: Serve) -> float:
    """Seconds from a request to its first token."""
    body = {"model": DEMO, "prompt": "The sea is", "max_tokens": 2, "stream": True}
    begun = time.monotonic()
    with httpx.stream("POST", url(stack), json=body, timeout=READY_S, trust_env=False) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                assert json.loads(line[6:])["choices"], line
                return time.monotonic() - begun
    raise AssertionError(f"no token: status {answer.status_code}")


def wake(home: Path, starts: int, console: Console) -> None:
    kept = os.environ.get("PRECAST_HOME") or Path(__file__).parents[1] / ".precast"
    model = import_model(DEMO, Path(kept) / "models", report=print).path
    (home / "models").mkdir(parents=True)
    (home / "models" / DEMO).symlink_to(model)
    (home / "precast.toml").write_text(EAGER)
    flags = ("--models-on-demand", "--idle-timeout=1", "--batch-sizes=1", "--prefill-buckets=")
    with serving(home, *flags) as stack:
        stack.wait_line("Precast serves", READY_S)
        time.sleep(3)  # other services have begun
        times = []
        for _ in range(starts + 1):
            times.append(first_token(stack))
            children = psutil.Process(stack.process.pid).children
            poll(lambda: not any(map(_leads, children())), READY_S, "it sleeps")  # noqa: B023
        stack.stop()
    first, *others = times
    console.print(
        f"from cold to a first token of {DEMO}: {first:.2f} s with packing, then "
        f"{statistics.median(others):.2f} s ({min(others):.2f} to {max(others):.2f}, {starts} "
        "times)"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--only", choices=("turns", "wake"))
    arguments = parser.parse_args()
    console, held = Console(soft_wrap=True), True
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only != "wake":
            held = take_turns(Path(scratch) / "turns", arguments.rounds, console)
        if arguments.only != "turns":
            wake(Path(scratch) / "wake", arguments.starts, console)
    sys.exit(0 if held else "a request failed, or the models took more than their bound")


if __name__ == "__main__":
    if not (Path.cwd() / "tests" / "support").is_dir():
        sys.exit("run it from the clone's root")
    main()
