"""A model's files out of a Hugging Face hub: which ones, of which commit, and whether they are
whole."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, PrecastError, Unavailable
from precast.models.importing.conversion import Report
from precast.models.importing.gguf.parts import model_name
from precast.models.json_file import read_object
from precast.tokenizer.template_files import TOOL_FILE

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

SMALL: Final = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    TOOL_FILE,
)
"""Files that a folder has beside its weights."""
INDEX: Final = "model.safetensors.index.json"
_ONE: Final = "model.safetensors"
_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_NAME: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(/(?P<file>[^/]+\.gguf))?"
)
_MOST_FILES: Final = 2000
_CHUNK: Final = 1 << 20
_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, kw_only=True)
class HubName:
    """``org/name``, or one of its files."""

    repo: str
    file: str | None
    """A GGUF file of it; None: its safetensors."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A commit of a repository."""

    repo: str
    commit: str
    files: Mapping[str, "RepoSibling"]
    """By name, those that a model's file can have."""

    def file(self, name: str) -> "RepoSibling":
        """Raises ModelNotFound."""
        if name not in self.files:
            raise ModelNotFound(f"{self.repo} has no file {ascii(name)[:80]}")
        return self.files[name]

    def size(self, name: str) -> int:
        return self.file(name).size or 0


def hub_name(text: str) -> HubName | None:
    """None for what is no name of a hub's."""
    found = _NAME.fullmatch(text)
    return HubName(repo=found["repo"], file=found["file"]) if found else None


def default_name(source: HubName) -> str:
    """What a model is called that nobody gave a name."""
    return model_name(source.file) if source.file else source.repo.partition("/")[2]


def find(repo: str, revision: str | None) -> Remote:
    """Raises ModelNotFound, or Unavailable."""
    from huggingface_hub import HfApi

    info = _asked(
        repo,
        lambda: HfApi(endpoint=_endpoint()).model_info(
            repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        ),
    )
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-f]{6,64}", info.sha):
        raise Unavailable(f"{repo}: the hub does not say which commit {revision or 'main'} is")
    siblings = (info.siblings or ())[:_MOST_FILES]
    files = {file.rfilename: file for file in siblings if _is_named(file.rfilename)}
    return Remote(repo=repo, commit=info.sha, files=files)


def _is_named(name: str) -> bool:
    return name == TOOL_FILE or _FILE.fullmatch(name) is not None


def first_files(remote: Remote) -> list[str]:
    """Those of a folder of safetensors, but for what an index names. Raises ConfigError for a
    repository that has none."""
    files = remote.files
    small = [name for name in SMALL if name in files]
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    if INDEX in files:
        return [*small, INDEX]
    if weights:
        return [*small, *([_ONE] if _ONE in weights else weights)]
    if ggufs := sorted(name for name in files if name.endswith(".gguf")):
        shown = ", ".join(ggufs[:8])
        raise ConfigError(
            f"{remote.repo}: name one of its files, as {remote.repo}/{ggufs[0]}; it has {shown}"
        )
    raise ConfigError(f"{remote.repo}: neither safetensors nor GGUF files are there")


def shards(remote: Remote, folder: Path) -> list[str]:
    """The weights that the index in ``folder`` names; none without one. Raises ModelCorrupt."""
    if not (folder / INDEX).is_file():
        return []
    named = read_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ModelCorrupt(f"{remote.repo}: {INDEX} is not an index of safetensors files")
    return sorted(set(named.values()))


def fetch(remote: Remote, name: str, folder: Path, report: Report) -> None:
    """One file into the folder, from where an earlier attempt has stopped. Raises ModelNotFound,
    Unavailable, or ModelCorrupt for one that is not what the hub has."""
    from huggingface_hub import hf_hub_download

    file, path = remote.file(name), folder / name
    _asked(
        remote.repo,
        lambda: hf_hub_download(
            remote.repo,
            name,
            revision=remote.commit,
            local_dir=folder,
            endpoint=_endpoint(),
            etag_timeout=_TIMEOUT_S,
            tqdm_class=_progress(name, report),
        ),
    )
    report(f"checking {name}")
    if not _is_whole(path, file):
        path.unlink(missing_ok=True)
        raise ModelCorrupt(f"{remote.repo}: {name} is not what the hub has; pull it again")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _is_whole(path: Path, file: "RepoSibling") -> bool:
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return False
    if file.lfs is not None:
        return _digest(path, hashlib.sha256()) == file.lfs.sha256
    if file.blob_id is None:
        return True
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return _digest(path, git) == file.blob_id


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())


def _progress(name: str, report: Report) -> Any:
    """A progress bar that reports instead of drawing."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Reported(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # the hub's own bars have one
            super().__init__(*args, **options)

        def display(self, *_args: Any, **_options: Any) -> bool:
            done = f" {self.n / self.total:.0%}" if self.total else ""
            report(f"downloading {name}{done}")
            return True

    return Reported


def _asked(repo: str, ask: Callable[[], Any]) -> Any:
    """Raises PrecastError with one line for whatever the hub's library raises."""
    from huggingface_hub import errors

    try:
        return ask()
    except PrecastError:
        raise
    except errors.GatedRepoError:
        raise ModelNotFound(
            f"{repo}: the hub wants to know you: accept its terms there, and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(f"{repo} has no such revision") from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError):
        raise ModelNotFound(f"{repo}: the hub has no such model, or wants HF_TOKEN") from None
    except Exception as error:  # of several libraries
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unavailable(f"{repo}: the hub can't be reached or does not answer: {said}") from None
