"""The model folder that a worker serves: checked before anything is started, and the same one for
as long as the worker runs, whatever is imported meanwhile. Its adapters are the bytes that were
there as it started: ranks read them from this process."""

import functools
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from precast.config.settings import DecodeWorkerSettings
from precast.errors import ConfigError
from precast.models.config import ModelConfig, load_config
from precast.models.importing.catalog import check_vocabulary, check_weights
from precast.models.weights.adapter_folder import (
    AdapterFiles,
    files_in,
    read_adapter,
    read_files,
)
from precast.system.held_folders import held_folder
from precast.system.sealed_file import SealedFile, sealed_copy
from precast.tokenizer.digest import tokenizer_digest
from precast.tokenizer.load import load_tokenizer


def model_folder(settings: DecodeWorkerSettings) -> Path:
    """Where the model is now that this process, or the one that it was forked from, began with."""
    return held_folder(settings.model_dir)


def open_model(settings: DecodeWorkerSettings) -> tuple[ModelConfig, Tokenizer]:
    """Raises PrecastError with one line, out of headers alone: within a second or two.

    Replicas are forked from a process that has called it.
    """
    found = _open(model_folder(settings))
    for name, folder in settings.adapter_folders:
        read_adapter(name, folder, found[0])
    for files in adapter_files(settings):
        read_files(files, found[0])  # a folder that is being written is another one by now
    return found


def adapter_files(settings: DecodeWorkerSettings) -> tuple[AdapterFiles, ...]:
    """Where ranks read adapters: copies that this process holds, or the one that it was forked
    from. Raises ConfigError."""
    sealed = [(name, *_sealed(name, folder)) for name, folder in settings.adapter_folders]
    return tuple(AdapterFiles(name, config.path, weights.path) for name, config, weights in sealed)


def digest_of_tokenizer(settings: DecodeWorkerSettings) -> str:
    """Of the folder that this worker has: others compare it with theirs. Raises ModelCorrupt."""
    return _digest(model_folder(settings))


_digest: Final = functools.cache(tokenizer_digest)


@functools.cache
def _sealed(name: str, folder: Path) -> tuple[SealedFile, SealedFile]:
    """Configuration and weights of an adapter, once and for all."""
    files = files_in(name, folder)
    try:
        return sealed_copy(files.config, f"{name}-config"), sealed_copy(files.weights, name)
    except OSError as error:
        raise ConfigError(f"adapter {name}: {error.filename}: {error.strerror}") from None


@functools.cache
def _open(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    config = load_config(folder)
    check_weights(folder, config)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(folder, config, tokenizer)
    return config, tokenizer
