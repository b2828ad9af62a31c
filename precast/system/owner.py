"""Holds state to one thread. An event loop's state has no locks: other threads return values to the
loop, and only the loop changes anything.
"""

import threading


class ThreadOwner:
    """Remembers the thread that made it; ``check`` fails in every other."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()

    def check(self) -> None:
        assert threading.get_ident() == self._owner, (
            f"changed by thread {threading.current_thread().name!r}, which does not own it"
        )
