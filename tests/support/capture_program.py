"""A capture program with the command line of ``precast.graphs.capture``, and no compiler in it.

``python capture_program.py LEDGER --out DIR`` reads factors on stdin and notes each start as a line in
``LEDGER/started``. The factor ``architecture`` chooses what happens: "gated" waits for the file
``LEDGER/open``; "hang", "crash", "exit", "eat", "refuse", "differ", "silent", "noisy", "orphan" are the
ways in which a capture can go wrong; anything else is captured at once.
"""

import json
import os
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
        file.write(f"{os.getpid()} {factors['architecture']} {factors['batch_size']}\n")
    say("exporting")
    code = misbehave(factors["architecture"], ledger)
    if code:
        return code
    say("compiling")
    (out / "graph.pt2").write_bytes(blake3(json.dumps(factors).encode()).digest(GRAPH_BYTES))
    say("verifying")
    if factors["architecture"] != "silent":
        (out / "report.json").write_text(json.dumps(REPORT))
    return 0


REPORT = {
    "max_relative_error": 1e-6,
    "step_us": 900.0,
    "export_s": 0.1,
    "compile_s": 0.2,
    "verify_s": 0.1,
}


def say(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


def misbehave(how: str, ledger: Path) -> int:
    match how:
        case "gated":
            while not (ledger / "open").exists():
                time.sleep(0.02)
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "orphan":
            subprocess.Popen(["sleep", "600"])
            return 1
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            raise RuntimeError("no such operator")
        case "eat":
            hoard = [bytearray(os.urandom(1 << 20)) for _ in range(2048)]
            time.sleep(600)
            return len(hoard)
        case "refuse":
            print("spec refused: kv_heads is odd", file=sys.stderr)
            return 2
        case "differ":
            print("graph differs from eager by 1.00e+00", file=sys.stderr)
            return 3
        case "noisy":
            print("x" * 3_000_000)
            print("{not json", flush=True)
            sys.stderr.write("y" * 3_000_000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
