"""Which files of a model all ranks of a start serve, those of its other replicas included."""

import mmap
from typing import Final

_SIZE: Final = 64
"""Of a digest in hex."""


class AgreedContent:
    """The digest that was seen first. Made before replicas are forked: they share its memory."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)

    def agrees(self, digest: str) -> bool:
        """Whether it is that one, or the first."""
        mine = digest.encode().ljust(_SIZE, b"\0")[:_SIZE]
        if self._memory[:] == bytes(_SIZE):
            self._memory[:] = mine
        return self._memory[:] == mine
