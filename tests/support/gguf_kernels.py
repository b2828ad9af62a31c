"""Blocks of every GGUF type, and what the kernels have to make of them."""

from collections.abc import Iterator

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from precast.ops import native as native  # registers the operators
from precast.ops.gguf_blocks import RawRows, pack_raw, values_of
from precast.ops.gguf_types import BLOCKS, PLAIN, ROUNDED, GgufType
from precast.ops.mixed import MixedPart, mixed_size, write_parts
from precast.ops.packing import Format

ops = torch.ops.precast
QUANTIZED = [kind for kind in GgufType if kind not in PLAIN]


def random_rows(kind: GgufType, rows: int, columns: int, seed: int = 0) -> RawRows:
    """Any bits, with scales that are ordinary numbers."""
    generator = np.random.default_rng(seed + int(kind))
    block = BLOCKS[kind]
    if kind in PLAIN:
        values = generator.normal(0, 0.1, (rows, columns)).astype(np.float32)
        data = gguf.quants.quantize(values, GGMLQuantizationType(kind)) if kind != 0 else values
        return RawRows(kind, columns, torch.from_numpy(data.view(np.uint8).reshape(rows, -1)))
    blocks = generator.integers(0, 256, (rows * columns // block.inputs, block.nbytes), np.uint8)
    for at in block.scales:
        scales = generator.normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == GgufType.MXFP4:
        blocks[:, 0] = generator.integers(118, 126, len(blocks))
    return RawRows(kind, columns, torch.from_numpy(blocks.reshape(rows, -1)))


def meant(raw: RawRows) -> Tensor:
    """What the gguf package makes of them, float32."""
    rows = np.ascontiguousarray(raw.rows.numpy())
    kind = GGMLQuantizationType(int(raw.type))
    if raw.type == GgufType.F32:
        return torch.from_numpy(rows.view("<f4"))
    data = rows.view("<f2") if raw.type == GgufType.F16 else rows
    return torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))


def packed(raws: list[RawRows]) -> Tensor:
    """A weight of these parts."""
    columns = raws[0].columns
    parts = [MixedPart(raw.format, raw.rows.shape[0]) for raw in raws]
    out = torch.empty(mixed_size(parts, columns), dtype=torch.uint8)
    for raw, panels in zip(raws, write_parts(out, parts, columns), strict=True):
        assert pack_raw(raw, panels)
    return out


def wrong_values() -> Iterator[str]:
    """Types whose values or products are not what they should be."""
    torch.manual_seed(0)
    x = torch.randn(21, 512)
    x[3] = 0
    inputs = _rounded(x)
    for kind in GgufType:
        raw = random_rows(kind, 43, 512)
        values = values_of(raw)
        if kind not in ROUNDED and not torch.equal(values, meant(raw)):
            yield f"values of {kind.name}"
        exact = (inputs if kind not in PLAIN else x.double()) @ values.double().T
        for rows in (1, 4, 21):
            got = ops.linear(x[:rows], packed([raw]), None, 43, int(Format.MIXED)).double()
            if (got - exact[:rows]).abs().max() > 2e-5 * exact.abs().max() + _step(x, values):
                yield f"{rows} rows of {kind.name}"
            if (got - exact[:rows]).abs().median() > 1e-5 * exact.abs().max():
                yield f"the median of {rows} rows of {kind.name}"


def _rounded(x: Tensor) -> Tensor:
    """Inputs as the kernels take them: 127 steps of each group's largest."""
    groups = x.view(x.shape[0], -1, 32)
    scale = groups.abs().amax(dim=2, keepdim=True) / 127
    steps = torch.where(scale > 0, groups / scale, torch.zeros_like(groups)).round()
    return (steps.double() * scale.double()).view(x.shape)


def _step(x: Tensor, values: Tensor) -> float:
    """Of an input halfway between two steps, which may go either way."""
    return float(x.abs().max() / 127 * values.abs().max()) * 1.01
