"""How much memory a model's packed weights take, from its configuration: neither torch nor the
weights are loaded."""

from typing import Final

from precast.models.config import ModelConfig
from precast.models.precision import Precision, row_bytes
from precast.models.weights.expected import expected_tensors

_TABLE: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"


def weight_bytes(config: ModelConfig, precision: Precision, *, tp: int, positions: int) -> int:
    """Of all ranks together, to within a few percent: what a rank of uneven shards holds twice is
    left out."""
    head = precision.head_quantization
    shapes = dict(expected_tensors(config))
    table = shapes.pop(_TABLE)
    total = tp * _linear(table, head, precision)  # whole on each rank
    if _HEAD in shapes or tp > 1:
        total += _linear(shapes.pop(_HEAD, table), head, precision)
    for shape in shapes.values():
        if len(shape) < 2:
            total += 4 * tp * sum(shape)  # norms, and biases: whole on each rank, in fp32
        elif len(shape) == 3:  # experts, [inputs, outputs] each
            total += shape[0] * _linear(shape[:0:-1], precision.quantization, precision)
        else:
            total += _linear(shape, precision.quantization, precision)
    rotary = 4 * positions * config.rotary_dim * len(config.ropes)  # cosines and sines
    return total + tp * rotary


def _linear(shape: tuple[int, ...], quantization: str, precision: Precision) -> int:
    rows, columns = shape[0], shape[-1]
    kind = precision.weight_dtype if quantization == "none" else quantization
    return -(-rows // 16) * 16 * row_bytes(kind, columns)
