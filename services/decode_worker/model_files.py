"""The model folder that a worker serves: checked before anything is started, and the same one for
as long as the worker runs, whatever is imported meanwhile."""

import functools
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from precast.config.settings import DecodeWorkerSettings
from precast.models.config import ModelConfig, load_config
from precast.models.importing.catalog import check_vocabulary, check_weights
from precast.models.weights.adapter_folder import read_adapter
from precast.system.held_folders import held_folder
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
    return found


def digest_of_tokenizer(settings: DecodeWorkerSettings) -> str:
    """Of the folder that this worker has: others compare it with theirs. Raises ModelCorrupt."""
    return _digest(model_folder(settings))


_digest: Final = functools.cache(tokenizer_digest)


@functools.cache
def _open(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    config = load_config(folder)
    check_weights(folder, config)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(folder, config, tokenizer)
    return config, tokenizer
