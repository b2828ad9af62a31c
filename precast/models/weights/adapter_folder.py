"""Adapter folders as PEFT writes them: what is in them, and whether it can be served.

Only headers are read: neither torch nor the weights are loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from safetensors import SafetensorError, safe_open

from precast.errors import ConfigError, ModelCorrupt
from precast.models.config import ModelConfig
from precast.models.json_file import read_object
from precast.models.shape import MAX_ADAPTER_RANK, AdapterShape, AdapterTarget
from precast.models.weights.expected import expected_tensors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_SIDES: Final = (".lora_A.weight", ".lora_B.weight")
_TARGETS: Final[Mapping[str, AdapterTarget]] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "qkv"),
    "o_proj": "output",
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "gate_up"),
    "down_proj": "down",
}
_REFUSED: Final[Mapping[str, tuple[Any, ...]]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None,),
    # others begin from a base that they have changed
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
"""Entries of the configuration, and their values that can be served."""


class AdapterFiles(NamedTuple):
    """Where an adapter is read from."""

    name: str
    """By which requests choose it."""
    config: Path
    weights: Path


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter."""

    name: str
    """By which requests choose it."""
    weights: Path
    """Its safetensors file."""
    nbytes: int
    """Of that file."""
    ranks: Mapping[str, int]
    """Of each linear that it changes, by the name of its module in the model."""
    alpha: float
    root_scaled: bool
    """Whether what it adds is divided by the root of the rank (rsLoRA)."""

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.ranks[module]
        return self.alpha / (math.sqrt(rank) if self.root_scaled else rank)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def target_of(module: str) -> AdapterTarget | None:
    """The kind of linear that a module is, or a part of; None: adapters don't change it."""
    in_expert = ".experts." in module
    return None if in_expert else _TARGETS.get(module.rpartition(".")[2])


def files_in(name: str, folder: Path) -> AdapterFiles:
    """Of a folder as PEFT writes it."""
    return AdapterFiles(name, folder / CONFIG, folder / WEIGHTS)


def read_adapter(name: str, folder: Path, config: ModelConfig) -> Adapter:
    """``config``: the model's. Raises ConfigError with one line."""
    return read_files(files_in(name, folder), config)


def read_files(files: AdapterFiles, config: ModelConfig) -> Adapter:
    """As ``read_adapter``."""
    try:
        return _read(files, config)
    except (ModelCorrupt, OSError, OverflowError, SafetensorError) as error:
        raise ConfigError(f"adapter {files.name}: {' '.join(str(error).split())[:300]}") from None


def shape_of_adapters(adapters: Sequence[Adapter]) -> AdapterShape | None:
    """What graphs depend on of them; None for none."""
    if not adapters:
        return None
    modules = {module for adapter in adapters for module in adapter.ranks}
    return AdapterShape(
        rank=max(rank for adapter in adapters for rank in adapter.ranks.values()),
        targets=tuple(sorted({target for one in modules if (target := target_of(one))})),
    )


def _read(files: AdapterFiles, config: ModelConfig) -> Adapter:
    name = files.name
    for path in (files.config, files.weights):
        if not path.is_file():
            raise ConfigError(f"adapter {name}: {path} is missing")
    raw = read_object(files.config)
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"adapter {name}: peft_type {raw.get('peft_type')!r} is not LORA")
    for key, good in _REFUSED.items():
        if raw.get(key) not in good:
            raise ConfigError(f"adapter {name}: {key} = {str(raw[key])[:80]} can't be served")
    alpha = raw.get("lora_alpha", 8)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"adapter {name}: lora_alpha = {str(alpha)[:40]} is no number")
    return Adapter(
        name=name,
        weights=files.weights,
        nbytes=files.weights.stat().st_size,
        ranks=_ranks(name, _shapes(files.weights), config),
        alpha=float(alpha),
        root_scaled=bool(raw.get("use_rslora")),
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _ranks(name: str, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> dict[str, int]:
    """Checks each tensor against the model's."""
    linears, found = expected_tensors(config), dict[str, int]()
    for key in sorted(shapes):
        side = next((side for side in _SIDES if key.endswith(side)), "")
        module = key.removeprefix(_PREFIX).removesuffix(side)
        if not side or target_of(module) is None or f"{module}.weight" not in linears:
            raise ConfigError(f"adapter {name}: tensor {key} changes nothing that can be adapted")
        rows, columns = linears[f"{module}.weight"]
        first, second = (shapes.get(f"{_PREFIX}{module}{side}", ()) for side in _SIDES)
        rank = first[0] if first else 0
        if first != (rank, columns) or second != (rows, rank):
            raise ConfigError(
                f"adapter {name}: {module} has A {list(first)} and B {list(second)}, where the "
                f"model has {[rows, columns]}"
            )
        if not 0 < rank <= MAX_ADAPTER_RANK:
            raise ConfigError(
                f"adapter {name}: rank {rank} of {module} is above {MAX_ADAPTER_RANK}"
            )
        found[module] = rank
    if not found:
        raise ConfigError(f"adapter {name}: it has no tensors")
    return found
