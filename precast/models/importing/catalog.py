"""The model folders of one ``models`` directory: what is there, and whether it can be served.

Only headers are read: neither torch nor the weights are loaded.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, PrecastError
from precast.models.config import ModelConfig, load_config
from precast.models.weights.checkpoint import weight_files
from precast.tokenizer.load import load_tokenizer

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model folder that can be served."""

    name: str
    path: Path
    architecture: str
    parameters: int
    """Elements of all tensors in its files."""
    size_bytes: int
    """Of all files in the folder."""
    context_length: int


@dataclass(frozen=True, kw_only=True)
class BrokenModel:
    """A folder that can't be served, and why in one line."""

    name: str
    path: Path
    problem: str


def check_name(name: str) -> str:
    """``name`` if it can name a model. Raises ``ConfigError``."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"model name {name!r}: letters, digits, '.', '_' and '-' only, 128 at most"
        )
    return name


def list_models(models_dir: Path) -> list[ModelInfo | BrokenModel]:
    """Every model folder by name, broken ones too. Empty if the directory doesn't exist."""
    if not models_dir.is_dir():
        return []
    folders = sorted(path for path in models_dir.iterdir() if path.is_dir())
    return [_inspect(folder) for folder in folders if not folder.name.startswith(".")]


def find_model(models_dir: Path, name: str) -> ModelInfo:
    """The model of this name. Raises ``ModelNotFound``, or what ``check_model`` raises."""
    folder = models_dir / check_name(name)
    if not folder.is_dir():
        raise ModelNotFound(f"no model {name!r} in {models_dir}; `precast models import` adds one")
    return check_model(folder)


def check_model(folder: Path) -> ModelInfo:
    """Describe a Hugging Face folder.

    Raises ``ModelNotFound``, ``ModelCorrupt`` or ``UnsupportedArchitecture`` with one line if a
    file is missing or unreadable, or the architecture is not one that Precast has.
    """
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    sizes = _tensor_sizes(folder)
    _check_tensors(folder, config, sizes)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ModelCorrupt(
            f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, "
            f"config.json only vocab_size = {config.vocab_size}"
        )
    return ModelInfo(
        name=folder.name,
        path=folder,
        architecture=config.architecture,
        parameters=sum(sizes.values()),
        size_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        context_length=config.max_position_embeddings,
    )


def _inspect(folder: Path) -> ModelInfo | BrokenModel:
    try:
        return check_model(folder)
    except PrecastError as error:
        return BrokenModel(name=folder.name, path=folder, problem=str(error))


def _tensor_sizes(folder: Path) -> dict[str, int]:
    """Elements of each tensor, by name."""
    sizes: dict[str, int] = {}
    for path in weight_files(folder):
        try:
            # opening compares the header's offsets with the file's length
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    sizes[name] = math.prod(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelCorrupt(f"{path}: {error}") from None
    return sizes


def _check_tensors(folder: Path, config: ModelConfig, sizes: dict[str, int]) -> None:
    wanted = ["model.embed_tokens.weight", "model.norm.weight"]
    wanted += [f"model.layers.{i}.input_layernorm.weight" for i in range(config.num_layers)]
    for name in wanted:
        if name not in sizes:
            raise ModelCorrupt(f"{folder}: tensor {name} is missing")
