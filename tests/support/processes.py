"""What processes are called, of which any may end meanwhile."""

from pathlib import Path


def words(pid: int) -> list[str]:
    """Of its command line, or of the title that it gave itself; none once it has ended."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return line.replace(b"\0", b" ").decode(errors="replace").split()
