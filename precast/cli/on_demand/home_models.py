"""The models of a home folder with their adapters, and what each would take."""

import asyncio
from pathlib import Path
from typing import Final, NamedTuple

from precast.cli.on_demand.home_adapters import Adapters, Candidate, candidates
from precast.cli.on_demand.parts import HomeAdapter, HomeModel
from precast.config.settings import DecodeWorkerSettings, ServeSettings, load_settings
from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, PrecastError
from precast.log import get_logger
from precast.models.adapter_limits import MAX_ADAPTERS
from precast.models.config import ModelConfig, load_config
from precast.models.importing.adapters import base_of
from precast.models.importing.catalog import check_name, check_weights, model_names
from precast.models.weights.adapter_folder import CONFIG, WEIGHTS, is_adapter, read_adapter
from precast.sizing import PROCESS_BYTES, size
from precast.system.free_memory import FreeMemory, gib

log = get_logger(__name__)

KV_SHARE: Final = 0.1
"""Of the bound, that the KV cache of one of several models may take; at least one sequence's."""
_STAMPED: Final = ("config.json", "model.gguf.json", "tokenizer.json")
_Stamp = tuple[object, ...]


class _Found(NamedTuple):
    """What was read of a model's folder and of its adapters'."""

    stamp: _Stamp
    model: HomeModel | PrecastError
    refused: dict[str, PrecastError]
    """Adapters that it can't have, by name."""


class HomeModels:
    """Looks at the folders when asked, and reads those that have changed."""

    def __init__(self, settings: ServeSettings, passed_on: dict[str, object], bound: int) -> None:
        """``passed_on``: settings of the decode workers. ``bound``: bytes of all models."""
        self._folder = settings.home / "models"
        self._settings = settings
        self._passed_on = passed_on
        # ranks are forked from a process of their own
        why = f"models on demand may take {gib(bound)}, {gib(PROCESS_BYTES)} of it to start ranks"
        self._free = FreeMemory(nbytes=max(0, bound - PROCESS_BYTES), why=why)
        self._known: dict[str, _Found] = {}
        self._looking = asyncio.Lock()

    async def find(self, name: str) -> HomeModel:
        """The model of this name, or the one whose adapter has it. Raises ``ModelNotFound``, or
        what is wrong with it."""
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

    def _look_at_all(self) -> list[HomeModel | PrecastError]:
        names, adapters = model_names(self._folder), candidates(self._folder, self._settings)
        for gone in set(self._known) - set(names):
            del self._known[gone]
        return [self._read(name, adapters).model for name in names]

    def _look(self, name: str) -> HomeModel | PrecastError:
        try:
            folder = self._folder / check_name(name)
        except PrecastError as error:
            return ModelNotFound(str(error))
        adapters = candidates(self._folder, self._settings)
        if (base := adapters.base_of(name)) is not None:
            return self._of_adapter(name, base, adapters)
        if not folder.is_dir():
            return ModelNotFound(f"no model {name!r} in {self._folder}")
        if is_adapter(folder):
            return _without_base(folder)
        return self._read(name, adapters).model

    def _of_adapter(self, name: str, base: str, adapters: Adapters) -> HomeModel | PrecastError:
        if base not in model_names(self._folder):
            return ModelNotFound(f"adapter {name}: no model {base!r} in {self._folder}")
        found = self._read(base, adapters)
        return found.refused.get(name, found.model)

    def _read(self, name: str, adapters: Adapters) -> _Found:
        """What is known of a model's folder, read again if something has changed."""
        folder, mine = self._folder / name, adapters.of(name)
        stamp = (*_stamp(folder, _STAMPED), *((one, _stamp(one.folder)) for one in mine))
        if name not in self._known or self._known[name].stamp != stamp:
            self._known[name] = self._read_anew(folder, mine, stamp)
        return self._known[name]

    def _read_anew(self, folder: Path, adapters: list[Candidate], stamp: _Stamp) -> _Found:
        refused = dict[str, PrecastError]()
        try:
            config = load_config(folder)
            kept = _good(adapters, config, refused)
            return _Found(stamp, self._measure(folder, config, kept), refused)
        except PrecastError as error:
            problem = error
        except Exception as error:  # one folder's files must not hide the others
            problem = ModelCorrupt(f"{folder}: {type(error).__name__}: {error}")
        log.warning("a model can't be served", model=folder.name, reason=str(problem))
        return _Found(stamp, problem, refused)

    def _measure(self, folder: Path, config: ModelConfig, adapters: list[Candidate]) -> HomeModel:
        """From headers alone. Raises ``PrecastError``."""
        check_weights(folder, config)
        if not (folder / "tokenizer.json").is_file():
            raise ModelCorrupt(f"{folder}: tokenizer.json is missing")
        given = dict(self._passed_on)
        if (asked := given.get("max_context_length")) is not None:
            given["max_context_length"] = min(int(str(asked)), config.max_position_embeddings)
        own = {"home": self._settings.home, "model": folder.name}
        own["adapter"] = tuple(one.setting for one in adapters)
        settings = load_settings(DecodeWorkerSettings, **{**given, **own})
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
            adapters=tuple(
                HomeAdapter(
                    name=one.name, created=int(one.folder.stat().st_mtime), setting=one.setting
                )
                for one in adapters
            ),
        )


def _good(
    adapters: list[Candidate], config: ModelConfig, refused: dict[str, PrecastError]
) -> list[Candidate]:
    """Those that the model can have; the others come into ``refused``, and don't keep it from being
    served."""
    good = list[Candidate]()
    for one in adapters:
        try:
            read_adapter(one.name, one.folder, config)
            if len(good) == MAX_ADAPTERS:
                raise ConfigError(f"adapter {one.name}: its model has {MAX_ADAPTERS} others")
            good.append(one)
        except PrecastError as error:
            log.warning("an adapter can't be served", adapter=one.name, reason=str(error))
            refused[one.name] = error
    return good


def _without_base(folder: Path) -> PrecastError:
    """Why an adapter is no model's."""
    try:
        return ModelNotFound(f"adapter {folder.name}: no model {base_of(folder)!r}")
    except PrecastError as error:
        return error


def _stamp(folder: Path, names: tuple[str, ...] = (CONFIG, WEIGHTS)) -> _Stamp:
    """Changes when the folder is another one, or one of these files changes."""
    files = [folder, *(folder / name for name in names)]
    stats = [path.stat() for path in files if path.exists()]
    return tuple(number for stat in stats for number in (stat.st_ino, stat.st_mtime_ns))
