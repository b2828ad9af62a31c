"""The model folders of one ``models`` directory: what is there, and whether it can be served.

Only headers are read: neither torch nor the weights are loaded.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from precast.errors import (
    ConfigError,
    ModelCorrupt,
    ModelNotFound,
    PrecastError,
    UnsupportedArchitecture,
)
from precast.models.config import ModelConfig, load_config
from precast.models.gguf_index import has_index, read_index
from precast.models.quantized.scheme import Stored, expected_files
from precast.models.weights.adapter_folder import is_adapter
from precast.models.weights.checkpoint import weight_files
from precast.models.weights.expected import expected_tensors
from precast.models.weights.zero_biases import zero_biases
from precast.system.pointer import refuse_pointer
from precast.tokenizer.load import load_tokenizer

_COMPUTED: Final = (".rotary_emb.inv_freq",)
"""Tensors of old checkpoints that are calculated anew."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
Info = TypeVar("Info")


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
    """Every model folder by name, broken ones too; adapters are none. Empty if the directory
    doesn't exist."""
    return [inspected(models_dir / name, check_model) for name in model_names(models_dir)]


def model_names(models_dir: Path) -> list[str]:
    """Names of all model folders, whatever is in them."""
    folders = models_dir.iterdir() if models_dir.is_dir() else ()
    return sorted(
        path.name
        for path in folders
        if path.is_dir() and not path.name.startswith(".") and not is_adapter(path)
    )


def find_model(models_dir: Path, name: str) -> ModelInfo:
    """The model of this name. Raises ``ModelNotFound``, or what ``check_model`` raises."""
    folder = models_dir / check_name(name)
    if not folder.is_dir():
        raise ModelNotFound(f"no model {name!r} in {models_dir}; `precast models import` adds one")
    if is_adapter(folder):
        raise ConfigError(f"{name} is an adapter: serve its model, with --adapter {name}")
    return check_model(folder)


def check_model(folder: Path) -> ModelInfo:
    """Describe a Hugging Face folder.

    Raises ``ModelNotFound``, ``ModelCorrupt`` or ``UnsupportedArchitecture`` with one line if a
    file is missing or unreadable, or the architecture is not one that Precast has.
    """
    config = load_config(folder)
    tensors = check_weights(folder, config)
    check_vocabulary(folder, config, load_tokenizer(folder))
    return ModelInfo(
        name=folder.name,
        path=folder,
        architecture=config.architecture,
        parameters=sum(math.prod(shape) for shape in tensors.values()),
        size_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        context_length=config.max_position_embeddings,
    )


def check_weights(folder: Path, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors, out of the headers, as they are once nothing is quantised.
    Raises ``ModelCorrupt`` if one is missing or of another shape, or ``UnsupportedArchitecture``
    for a type or a tensor that nothing reads."""
    found = _read_headers(folder)
    # one more than there are, whatever config.json counts: then one of them is missing
    expected = expected_tensors(config, at_most=len(found) + 1)
    files = _expected_files(folder, config, expected, found)
    for name, wanted in files.items():
        if name not in found:
            raise ModelCorrupt(f"{folder}: tensor {name} is missing")
        shape, dtype = found[name]
        if shape != wanted.shape:
            raise ModelCorrupt(
                f"{folder}: tensor {name} has shape {shape}, not {wanted.shape} as by config.json"
            )
        if dtype not in wanted.dtypes:
            raise UnsupportedArchitecture(
                f"{folder}: tensor {name} has type {dtype}, which is not one of: "
                f"{', '.join(wanted.dtypes)}"
            )
    others = set(found) - set(files)
    _refuse_others(folder, config, others - _needless_biases(folder, config, expected, found))
    return expected


def _needless_biases(
    folder: Path,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[tuple[int, ...], str]],
) -> set[str]:
    """Biases of zeros that quantised linears have and the model has not."""
    if config.scheme is None:
        return set()
    modules = [name.removesuffix(".weight") for name, shape in expected.items() if len(shape) == 2]
    biases = {
        bias
        for module in modules
        if (bias := f"{module}.bias") in found
        and bias not in expected
        and found[bias][0] == (expected[f"{module}.weight"][0],)
        and config.scheme.is_stored(module, found)
    }
    return zero_biases(folder, biases)


def _expected_files(
    folder: Path,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    names: Collection[str],
) -> dict[str, Stored]:
    if config.scheme is None:
        return {name: Stored(shape) for name, shape in expected.items()}
    if not any(config.scheme.is_stored(name.removesuffix(".weight"), names) for name in expected):
        raise ModelCorrupt(
            f"{folder}: config.json says that weights are quantised, but no tensor of such is there"
        )
    return dict(expected_files(config.scheme, expected, names))


def _refuse_others(folder: Path, config: ModelConfig, names: Collection[str]) -> None:
    """Raises ``UnsupportedArchitecture`` for a layer's tensor that nothing reads."""
    layers = tuple(f"model.layers.{index}." for index in range(config.num_layers))
    for name in sorted(names):
        extra = config.scheme is not None and config.scheme.is_extra(name)
        if name.startswith(layers) and not name.endswith(_COMPUTED) and not extra:
            raise UnsupportedArchitecture(
                f"{folder}: tensor {name} is none of a {config.architecture} model's"
            )


def check_vocabulary(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises ``ModelCorrupt`` if the tokenizer has tokens that the model has not."""
    count = tokenizer.get_vocab_size()
    if count > config.vocab_size:
        raise ModelCorrupt(
            f"{folder}: tokenizer.json has {count} tokens, "
            f"config.json only vocab_size = {config.vocab_size}"
        )
    if has_index(folder):
        return  # a GGUF file's have no gaps between their ids
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= config.vocab_size:
        raise ModelCorrupt(
            f"{folder}: tokenizer.json has a token {highest}, "
            f"config.json only vocab_size = {config.vocab_size}"
        )


def inspected(folder: Path, check: Callable[[Path], Info]) -> Info | BrokenModel:
    """What ``check`` says of a folder, or why that can't be served."""
    try:
        return check(folder)
    except PrecastError as error:
        problem = str(error)
    except Exception as error:  # one folder's files must not hide the others
        problem = f"{folder}: {type(error).__name__}: {error}"
    return BrokenModel(name=folder.name, path=folder, problem=" ".join(problem.split())[:500])


def _read_headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor, by name; all of a GGUF file's can be floats."""
    if has_index(folder):
        return {name: (tensor.shape, "F32") for name, tensor in read_index(folder).items()}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in weight_files(folder):
        refuse_pointer(path)
        try:
            # opening compares the header's offsets with the file's length
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    part = file.get_slice(name)
                    found[name] = (tuple(part.get_shape()) or (1,), part.get_dtype())
        except (SafetensorError, OSError) as error:
            said = " ".join(str(error).split())[:300]
            raise ModelCorrupt(f"{path}: weights can't be read: {said}") from None
    return found
