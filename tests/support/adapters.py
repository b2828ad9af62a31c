"""LoRA adapters as PEFT writes them, and models with one merged into their weights."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from precast.graphs.factors import rank_factors
from precast.models.config import load_config
from precast.models.layers import Paging
from precast.models.load import load_weights
from precast.models.precision import Precision
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.models.weights.adapter_folder import read_adapter, shape_of_adapters, target_of
from precast.models.weights.adapters import AdapterFolders
from precast.models.weights.expected import expected_tensors
from tests.support.architectures import BLOCK_SIZE, BLOCKS, POSITIONS, Loaded, load

ALPHA = 6.0
Tensors = dict[str, Tensor]


def write_adapter(
    folder: Path,
    model: Path,
    *,
    rank: int = 4,
    targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj", "down_proj"),
    seed: int = 0,
    **config: Any,
) -> Path:
    """A random one for the model's linears whose names end so, of values that bfloat16 has: with
    ALPHA / rank 1.5 or a power of two, they are the same in an adapter's 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in expected_tensors(load_config(model)).items():
        module = name.removesuffix(".weight")
        if module.endswith(targets) and target_of(module) is not None:
            rows, columns = shape
            a = torch.randn(rank, columns, generator=generator) * columns**-0.5
            b = torch.randn(rows, rank, generator=generator) * 0.3
            sides = {_name(module, "A"): a, _name(module, "B"): b}
            tensors |= {name: x.bfloat16().float() for name, x in sides.items()}
    values = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": sorted(targets),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_merged(folder: Path, model: Path, adapter: Path) -> Path:
    """The model with W + B A alpha / rank in place of its weights."""
    shutil.copytree(model, folder)
    added = _added(load_file(adapter / "adapter_model.safetensors"))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        merged = {
            name: weight + added[name].to(weight.dtype) if name in added else weight
            for name, weight in tensors.items()
        }
        save_file(merged, path, {"format": "pt"})
    return folder


@dataclass(frozen=True, kw_only=True)
class Mixed(Loaded):
    """Sequence 0 has no adapter, sequence 1 the first, sequence 2 the second, if there is one."""

    slots: Tensor
    count: int
    """Of adapters."""

    def eager(self, tokens: Tensor, positions: Tensor, paging: Paging) -> Tensor:
        self.choose(paging)
        return super().eager(tokens, positions, paging)

    def choose(self, paging: Paging) -> None:
        """Before a step."""
        which = paging.block_tables[:, 0] // BLOCKS  # each sequence has its own part of the cache
        each = which.repeat_interleave(paging.query_starts.diff()) % (self.count + 1)
        self.slots.zero_()
        self.slots[: len(each)] = each


def mixed(folder: Path, adapters: Sequence[Path]) -> Mixed:
    config = load_config(folder)
    part = shard(config, 0, 1)
    found = [read_adapter(one.name, one, config) for one in adapters]
    shape = shape_of(config, part, Precision(), shape_of_adapters(found))
    source = AdapterFolders(found)
    return Mixed(
        shape=shape,
        weights=load_weights(folder, config, part, shape, POSITIONS, adapters=source),
        caches=load(folder).caches,
        factors=rank_factors(shape, block_size=BLOCK_SIZE, torch_version=str(torch.__version__)),
        slots=source.slots,
        count=source.count,
    )


def _added(tensors: Mapping[str, Tensor]) -> Tensors:
    modules = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in tensors
        if name.endswith("lora_A.weight")
    }
    found = {}
    for module in modules:
        a, b = tensors[_name(module, "A")], tensors[_name(module, "B")]
        found[f"{module}.weight"] = (b.double() @ a.double() * (ALPHA / len(a))).float()
    return found


def _name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"
