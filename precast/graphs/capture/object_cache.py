"""Compiled parts that a compile worker keeps between captures.

Embedding and head are compiled for any number of rows, so captures of further sizes find them
here. The folder is the worker's own, like its signing key, and holds one entry for each part, named
by all that decides its code. An entry whose bytes are not what was put in is no entry.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from precast.graphs.artifacts.manifest import file_digest

MAX_ENTRIES = 64
"""At 0.2 MB each; the least recently used go."""


def part_key(name: str, factors: Mapping[str, str], build: Mapping[str, str]) -> str:
    """Names a part that serves every size."""
    decides = {key: value for key, value in factors.items() if key != "num_tokens"}
    content = json.dumps([name, decides, dict(build)], sort_keys=True)
    return blake3(content.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class PartCache:
    folder: Path

    def get(self, key: str, target: Path) -> bool:
        """Copies an entry to ``target``; returns whether there is one."""
        for found in self.folder.glob(f"{key}.*.so"):
            try:
                shutil.copyfile(found, target)
                if file_digest(target) == found.name.split(".")[1]:
                    os.utime(found)
                    return True
            except FileNotFoundError:  # another capture has replaced or dropped it meanwhile
                continue
            found.unlink(missing_ok=True)
        return False

    def put(self, key: str, path: Path) -> None:
        """Keeps a part. The newest entry of a key counts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = self.folder / f"{key}.{file_digest(path)}.so"
        partial = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
        shutil.copyfile(path, partial)
        for older in self.folder.glob(f"{key}.*.so"):
            if older != entry:
                older.unlink(missing_ok=True)
        partial.rename(entry)
        self._bound()

    def _bound(self) -> None:
        def age(path: Path) -> float:
            try:
                return path.stat().st_mtime
            except FileNotFoundError:
                return 0.0

        for path in sorted(self.folder.iterdir(), key=age)[:-MAX_ENTRIES]:
            path.unlink(missing_ok=True)
