"""Which adapters the models of a home folder have: those that were imported for them, and those
that settings name."""

from pathlib import Path
from typing import NamedTuple

from precast.config.settings import ServeSettings, adapter_of
from precast.errors import PrecastError
from precast.models.importing.adapters import adapter_folders, base_of


class Candidate(NamedTuple):
    """An adapter that was not looked into yet."""

    name: str
    folder: Path
    setting: str
    """As the decode worker's ``adapter`` names it."""


class Adapters(NamedTuple):
    """All there are."""

    by_base: dict[str, list[Candidate]]

    def of(self, model: str) -> list[Candidate]:
        return self.by_base.get(model, [])

    def base_of(self, name: str) -> str | None:
        """The model whose adapter has this name; None: no adapter has."""
        for base, each in self.by_base.items():
            if any(one.name == name for one in each):
                return base
        return None


def candidates(models_dir: Path, settings: ServeSettings) -> Adapters:
    """A name in the folder is the folder's: what settings call so is left out."""
    found = dict[str, list[Candidate]]()
    for folder in adapter_folders(models_dir):
        try:
            base = base_of(folder)
        except PrecastError:
            continue  # whoever asks for it is told
        found.setdefault(base, []).append(Candidate(folder.name, folder, folder.name))
    for text in settings.adapter:
        name, given = adapter_of(text)
        if given is not None and not (models_dir / name).is_dir():
            found.setdefault(settings.model, []).append(Candidate(name, given, text))
    return Adapters(found)
