"""How much memory a model's packed weights take, from its configuration: neither torch nor the
weights are loaded."""

from collections.abc import Sequence
from typing import Final

from precast.models.config import ModelConfig
from precast.models.precision import Precision, row_bytes
from precast.models.quantized.mxfp4 import Mxfp4, own_type
from precast.models.weights.adapter_folder import Adapter, shape_of_adapters, target_of
from precast.models.weights.expected import expected_tensors
from precast.ops.gguf_types import GgufType, packed_row_bytes

_TABLE: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"


def weight_bytes(config: ModelConfig, precision: Precision, *, tp: int, positions: int) -> int:
    """Of all ranks together, to within a few percent: what a rank of uneven shards holds twice is
    left out."""
    shapes = dict(expected_tensors(config))
    types = config.file_types or {}
    if isinstance(config.scheme, Mxfp4):
        types = {name: own_type(shape) for name, shape in shapes.items()}
    table = shapes.pop(_TABLE)
    total = tp * _vocabulary(table, types.get(_TABLE), precision)  # whole on each rank
    if _HEAD in shapes or tp > 1:
        kind = types.get(_HEAD, types.get(_TABLE))
        total += _vocabulary(shapes.pop(_HEAD, table), kind, precision)
    for name, shape in shapes.items():
        if len(shape) < 2:
            total += 4 * tp * sum(shape)  # norms, and biases: whole on each rank, in fp32
        elif len(shape) == 3:  # experts, [inputs, outputs] each
            kind = types.get(name)
            total += shape[0] * _linear(shape[:0:-1], precision.quantization, precision, kind)
        else:
            total += _linear(shape, precision.quantization, precision, types.get(name))
    rotary = 4 * positions * config.rotary_dim * len(config.ropes)  # cosines and sines
    return total + tp * rotary


def adapter_bytes(config: ModelConfig, adapters: Sequence[Adapter]) -> int:
    """Of all adapters' weights side by side, to within a few percent as above."""
    shape = shape_of_adapters(adapters)
    if shape is None:
        return 0
    sides = [
        rows + columns
        for name, (rows, *rest) in expected_tensors(config).items()
        if target_of(name.removesuffix(".weight")) in shape.targets
        for columns in rest
    ]
    return 2 * len(adapters) * shape.rank * sum(sides)


def _vocabulary(shape: tuple[int, ...], own: GgufType | None, precision: Precision) -> int:
    return _linear(shape, precision.head_quantization, precision, own)


def _linear(
    shape: tuple[int, ...], quantization: str, precision: Precision, own: GgufType | None = None
) -> int:
    """``own``: the type that a file has it in."""
    rows, columns = shape[0], shape[-1]
    kind = precision.weight_dtype if quantization == "none" else quantization
    if kind == "file":
        size = packed_row_bytes(own or GgufType.Q8_0, columns)
    else:
        size = row_bytes(kind, columns)
    return -(-rows // 16) * 16 * size
