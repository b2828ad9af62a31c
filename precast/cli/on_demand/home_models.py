"""The models of a home folder, and what each would take."""

import asyncio
from pathlib import Path
from typing import Final

from precast.cli.on_demand.parts import HomeModel
from precast.config.settings import DecodeWorkerSettings, ServeSettings, load_settings
from precast.errors import ModelCorrupt, ModelNotFound, PrecastError
from precast.log import get_logger
from precast.models.config import load_config
from precast.models.importing.catalog import check_name, check_weights
from precast.sizing import PROCESS_BYTES, size
from precast.system.free_memory import FreeMemory, gib

log = get_logger(__name__)

KV_SHARE: Final = 0.1
"""Of the bound, that the KV cache of one of several models may take; at least one sequence's."""
_STAMPED: Final = ("config.json", "model.gguf.json", "tokenizer.json")
_Found = HomeModel | PrecastError
_Stamp = tuple[int, ...]


class HomeModels:
    """Looks at the folders when asked, and reads those that have changed."""

    def __init__(self, settings: ServeSettings, passed_on: dict[str, object], bound: int) -> None:
        """``passed_on``: settings of the decode workers. ``bound``: bytes of all models."""
        self._folder = settings.home / "models"
        self._home = settings.home
        self._passed_on = passed_on
        # ranks are forked from a process of their own
        why = f"models on demand may take {gib(bound)}, {gib(PROCESS_BYTES)} of it to start ranks"
        self._free = FreeMemory(nbytes=max(0, bound - PROCESS_BYTES), why=why)
        self._known: dict[str, tuple[_Stamp, _Found]] = {}
        self._looking = asyncio.Lock()

    async def find(self, name: str) -> HomeModel:
        """Raises ``ModelNotFound``, or what is wrong with the model."""
        async with self._looking:
            found = await asyncio.to_thread(self._look, name)
        if isinstance(found, PrecastError):
            raise found.with_traceback(None)
        return found

    async def all(self) -> list[HomeModel]:
        """What can be served, by name. What can't is logged once."""
        async with self._looking:
            found = await asyncio.to_thread(self._look_at_all)
        return [one for one in found if isinstance(one, HomeModel)]

    def _look_at_all(self) -> list[_Found]:
        if not self._folder.is_dir():
            return []
        names = sorted(path.name for path in self._folder.iterdir() if path.is_dir())
        for gone in set(self._known) - set(names):
            del self._known[gone]
        return [self._look(name) for name in names if not name.startswith(".")]

    def _look(self, name: str) -> _Found:
        try:
            folder = self._folder / check_name(name)
        except PrecastError as error:
            return ModelNotFound(str(error))
        if not folder.is_dir():
            return ModelNotFound(f"no model {name!r} in {self._folder}")
        stamp = _stamp(folder)
        if name not in self._known or self._known[name][0] != stamp:
            self._known[name] = stamp, self._read(folder)
        return self._known[name][1]

    def _read(self, folder: Path) -> _Found:
        try:
            return self._measure(folder)
        except PrecastError as error:
            problem = error
        except Exception as error:  # one folder's files must not hide the others
            problem = ModelCorrupt(f"{folder}: {type(error).__name__}: {error}")
        log.warning("a model can't be served", model=folder.name, reason=str(problem))
        return problem

    def _measure(self, folder: Path) -> HomeModel:
        """From headers alone. Raises ``PrecastError``."""
        config = load_config(folder)
        check_weights(folder, config)
        if not (folder / "tokenizer.json").is_file():
            raise ModelCorrupt(f"{folder}: tokenizer.json is missing")
        given = dict(self._passed_on)
        if (asked := given.get("max_context_length")) is not None:
            given["max_context_length"] = min(int(str(asked)), config.max_position_embeddings)
        settings = load_settings(
            DecodeWorkerSettings, **{**given, "home": self._home, "model": folder.name}
        )
        sizing = size(settings, folder, self._free, kv_share=KV_SHARE)
        # as the worker will have it, which is told how many blocks
        settings = settings.model_copy(update={"kv_blocks": sizing.blocks})
        sizing = size(settings, folder, self._free)
        return HomeModel(
            name=folder.name,
            created=int(folder.stat().st_mtime),
            context_length=sizing.context,
            kv_blocks=sizing.blocks,
            nbytes=sizing.nbytes + PROCESS_BYTES,
        )


def _stamp(folder: Path) -> _Stamp:
    """Changes when the folder is another one, or one of its small files changes."""
    files = [folder, *(folder / name for name in _STAMPED)]
    stats = [path.stat() for path in files if path.exists()]
    return tuple(number for stat in stats for number in (stat.st_ino, stat.st_mtime_ns))
