"""``precast serve`` on a disk that gets full: it serves on, and says what it can't write."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from pathlib import Path
from tests.support.chaos_serve import write_until_full
from tests.support.models import write_model
from tests.support.serve_stack import MODEL, NO_GRAPHS, serving

LEASE_S = 6.0
home = Path(sys.argv[1])
write_model(home / "models" / MODEL)
(home / "precast.toml").write_text(NO_GRAPHS)
with serving(home, f"--model={MODEL}", "--batch-sizes=1", "--prefill-buckets=") as stack:
    stack.wait_line(f"Precast serves {MODEL} at http://", 100)
    answers = [stack.ask("One, two,", 4).status_code]
    write_until_full(home / "filler")
    until = time.monotonic() + LEASE_S + 1
    try:
        while time.monotonic() < until:
            answers.append(stack.ask("One, two,", 4).status_code)
            time.sleep(0.2)
    except Exception:  # the disk is gone with this process
        for log in (home / "logs").iterdir():
            print(log.name, log.read_text()[-4000:], file=sys.stderr)
        raise
    line = stack.wait_line("disk full", 20)
    assert "serving goes on" in line and str(home) in line, line
    assert set(answers) == {200}, answers
    (home / "filler").unlink()
    stack.wait_line("disk has room again", 20)
    assert stack.stop() == 0
print("served", len(answers) > 10)
"""


def test_serving_needs_no_disk_once_it_runs(tmp_path: Path) -> None:
    """On a disk of its own, in a mount namespace of its own; for longer than a lease lives."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "-r"]
    mount = 'mount -t tmpfs -o size=64m small "$1" && exec "$2" -c "$0" "$1"'
    command = [*unshare, "sh", "-c", mount, PROGRAM, str(tmp_path), sys.executable]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "served True"
