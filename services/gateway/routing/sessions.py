"""Which worker had the last request of each session that clients name."""

from collections import OrderedDict
from typing import Final

MAX_SESSIONS: Final = 1 << 14


class Sessions:
    """Bounded: the session that was quiet for longest is forgotten first."""

    def __init__(self, most: int = MAX_SESSIONS) -> None:
        self._most = most
        self._workers: OrderedDict[str, str] = OrderedDict()

    def worker(self, session: str) -> str:
        """Id of its worker; empty if there is none."""
        return self._workers.get(session, "") if session else ""

    def sent(self, session: str, worker_id: str) -> None:
        if not session:
            return
        self._workers[session] = worker_id
        self._workers.move_to_end(session)
        if len(self._workers) > self._most:
            self._workers.popitem(last=False)
