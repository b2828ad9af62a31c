"""Memory of KV caches that outlives the ranks which write it.

It belongs to the leader: a file without a name for each rank, which a rank maps, and the next one
in its place maps again. It costs memory where it was written. A rank sizes it (``models.kv_cache``)
and the leader never maps it.
"""

import os


class KvMemory:
    def __init__(self, ranks: int) -> None:
        self.files = [os.memfd_create(f"precast-kv-{rank}") for rank in range(ranks)]

    def clear(self) -> None:
        """What was written is gone, and its memory free; nobody has it mapped."""
        for file in self.files:
            os.ftruncate(file, 0)

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []
