"""A capture program for ``fork_server``, and no compiler in it.

``capture_program LEDGER --out DIR`` reads factors on stdin and notes each start as a
line in ``LEDGER/started``. The factor ``architecture`` chooses what happens: "gated" waits for the
file ``LEDGER/open``, as all do while there is a file ``LEDGER/closed``; "foreign" is captured for a
CPU that isn't there; "hang", "crash", "exit",
"eat", "refuse", "differ", "silent", "noisy", "orphan" are the ways in which a capture can go wrong;
anything else is captured at once. The graph is the file
``LEDGER/package`` if there is one, else bytes that stand for it: the factors, and bytes that follow
from them. The file
``LEDGER/pace`` holds how many seconds each capture takes longer.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from blake3 import blake3

GRAPH_BYTES = 300_000


def main() -> int:
    ledger, out = Path(sys.argv[1]), Path(sys.argv[3])
    factors = json.load(sys.stdin)
    with (ledger / "started").open("a") as file:
        file.write(f"{os.getpid()} {factors['architecture']} {factors['num_tokens']}\n")
    say("exporting")
    if (ledger / "closed").exists():
        wait_for_gate(ledger)
    if (ledger / "pace").exists():
        time.sleep(float((ledger / "pace").read_text()))
    code = misbehave(factors["architecture"], ledger)
    if code:
        return code
    say("compiling")
    if (ledger / "package").exists():
        shutil.copyfile(ledger / "package", out / "graph.pt2")
    else:
        (out / "graph.pt2").write_bytes(_package(json.dumps(factors).encode()))
    say("verifying")
    if factors["architecture"] != "silent":
        foreign = factors["architecture"] == "foreign"
        (out / "report.json").write_text(json.dumps(UNVERIFIED if foreign else REPORT))
    return 0


def _package(factors: bytes) -> bytes:
    return factors + b"\n" + blake3(factors).digest(GRAPH_BYTES)


def factors_of(graph: Path) -> dict[str, str] | None:
    """What a graph was captured for; None if one byte of it is not what a capture has written."""
    raw = graph.read_bytes()
    factors = raw.partition(b"\n")[0]
    return json.loads(factors) if raw == _package(factors) else None


UNVERIFIED = {"compile_s": 1.0, "verified": False}


REPORT = {
    "max_relative_error": 1e-6,
    "layer_us": 900.0,
    "compile_s": 0.2,
    "verify_s": 0.1,
}


def say(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


def wait_for_gate(ledger: Path) -> int:
    while not (ledger / "open").exists():
        time.sleep(0.02)
    return 0


def hang(_: Path) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    return 1


def leave_orphan(_: Path) -> int:
    subprocess.Popen(["sleep", "600"])
    return 1


def crash(_: Path) -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 1


def raise_error(_: Path) -> int:
    raise RuntimeError("no such operator")


def eat_memory(ledger: Path) -> int:
    hoard = []
    for _ in range(100):
        hoard.append(b"x" * (16 << 20))
        time.sleep(0.01)
    return hang(ledger)


def refuse(_: Path) -> int:
    print("spec refused: kv_heads is odd", file=sys.stderr)
    return 2


def differ(_: Path) -> int:
    """The graph's logits are wrong in one place, and kept as verification does it."""
    import msgspec
    import numpy as np
    from safetensors.numpy import save_file

    from precast.graphs.capture.verify.failure import FAILURE_FILE, FOLDER, TENSORS_FILE, Mismatch

    mismatch = Mismatch(
        case="block edges",
        seed=1,
        context_lens=(7, 32),
        bound=1e-4,
        differences={"keys of layer 0": 0.0, "logits": 2.0},
        output="logits",
        index=(1, 3),
        expected=1.0,
        actual=3.0,
    )
    folder = Path(sys.argv[3]) / FOLDER
    folder.mkdir()
    tensors = {"actual": np.array([1, 1, 1, 3, 1]), "context_lens": np.array([7, 32])}
    save_file(tensors, folder / TENSORS_FILE)
    (folder / FAILURE_FILE).write_bytes(msgspec.json.encode(mismatch))
    (folder.parent / "layer.kernels.cpp").write_text("// generated")
    print(mismatch.text, file=sys.stderr)
    return 3


def make_noise(_: Path) -> int:
    print("x" * 3_000_000)
    print("{not json", flush=True)
    sys.stderr.write("y" * 3_000_000)
    return 0


BEHAVIOURS = {
    "gated": wait_for_gate,
    "hang": hang,
    "orphan": leave_orphan,
    "crash": crash,
    "exit": raise_error,
    "eat": eat_memory,
    "refuse": refuse,
    "differ": differ,
    "noisy": make_noise,
}


def misbehave(how: str, ledger: Path) -> int:
    """Do what the factor says; the exit code, 0 to go on."""
    return BEHAVIOURS[how](ledger) if how in BEHAVIOURS else 0


def preload() -> None:
    """There is nothing to import."""
