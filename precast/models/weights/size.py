"""How much memory a model's packed weights take, from the headers of its files: neither torch nor
the weights are loaded."""

from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from precast.errors import ModelCorrupt
from precast.models.config import ModelConfig
from precast.models.precision import Precision, row_bytes
from precast.models.weights.checkpoint import weight_files

_TABLE: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"


def weight_bytes(
    folder: Path, config: ModelConfig, precision: Precision, *, tp: int, positions: int
) -> int:
    """Of all ranks together, to within a few percent: what a rank of uneven shards holds twice is
    left out. Raises ModelCorrupt."""
    head = precision.head_quantization
    shapes = _shapes(folder)
    table = shapes.pop(_TABLE, (config.vocab_size, config.hidden_size))
    total = tp * _linear(table, head, precision)  # whole on each rank
    if _HEAD in shapes or tp > 1:
        total += _linear(shapes.pop(_HEAD, table), head, precision)
    for shape in shapes.values():
        if len(shape) < 2:
            total += 4 * tp * sum(shape)  # norms, and biases: whole on each rank, in fp32
        else:
            total += _linear(shape, precision.quantization, precision)
    rotary = 4 * positions * config.rotary_dim * len(config.ropes)  # cosines and sines
    return total + tp * rotary


def _linear(shape: tuple[int, ...], quantization: str, precision: Precision) -> int:
    rows, columns = shape[0], shape[-1]
    kind = precision.weight_dtype if quantization == "none" else quantization
    return -(-rows // 16) * 16 * row_bytes(kind, columns)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelCorrupt(f"{path}: {error}") from None
    return shapes
