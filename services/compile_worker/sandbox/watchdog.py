"""Kills a capture's process group: ``python guard.py CAPTURE LIFELINE``, two descriptors.

CAPTURE is the capture's pidfd. LIFELINE is a socket whose other end the compile worker holds: it
becomes readable when that closes, at the latest with the worker's death. Whichever is first, the
whole group goes, this process included: compilers that a capture has started would outlive it.
Standard library only: this file runs as a script, beside every capture.
"""

import os
import select
import signal
import sys


def main(capture: int, lifeline: int) -> None:
    """Does not return."""
    select.select([capture, lifeline], [], [])
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
