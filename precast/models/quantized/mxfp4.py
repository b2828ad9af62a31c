"""MXFP4, as gpt-oss has its experts: 4-bit floats, two in a byte, with a power of two for each 32
inputs. All experts of a layer are in one tensor; other linears are floats.

Experts run as GGUF's blocks of the same type, other linears as the floats that they are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from precast.errors import ModelCorrupt
from precast.models.precision import Quantization
from precast.models.quantized.scheme import Files, Scheme, Stored
from precast.ops.gguf_types import GgufType
from precast.ops.layout import GROUP

if TYPE_CHECKING:
    from torch import Tensor

    from precast.ops.gguf_blocks import FileWeight
    from precast.ops.scaled import ScaledWeight


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    quantization: Quantization = "file"
    loss: str = ""

    def is_stored(self, module: str, names: Collection[str]) -> bool:
        return f"{module}_blocks" in names

    def tensors(
        self, module: str, shape: tuple[int, ...], names: Collection[str]
    ) -> Mapping[str, Stored]:
        """``shape``: experts, inputs, outputs."""
        del names
        experts, inputs, outputs = shape
        groups = -(-inputs // GROUP)
        return {
            f"{module}_blocks": Stored((experts, outputs, groups, GROUP // 2), ("U8",)),
            f"{module}_scales": Stored((experts, outputs, groups), ("U8",)),
        }

    def is_extra(self, name: str) -> bool:
        del name
        return False

    def read(self, files: Files, module: str, shape: tuple[int, int]) -> "ScaledWeight":
        raise ModelCorrupt(f"{module}: only experts can be of mxfp4")

    def expert(
        self, files: Files, module: str, index: int, shape: tuple[int, int, int]
    ) -> "FileWeight":
        """One expert's weights, [outputs, inputs]."""
        from precast.ops.gguf_blocks import FileWeight, RawRows

        stored = self.tensors(module, shape, ())
        blocks = files.get(f"{module}_blocks", stored[f"{module}_blocks"].shape)[index]
        scales = files.get(f"{module}_scales", stored[f"{module}_scales"].shape)[index]
        return FileWeight([RawRows(GgufType.MXFP4, shape[1], _gguf_rows(blocks, scales))])


def own_type(shape: tuple[int, ...]) -> GgufType:
    """What a linear, or a tensor of experts, takes in memory."""
    return GgufType.MXFP4 if len(shape) == 3 else GgufType.BF16


def _gguf_rows(blocks: "Tensor", scales: "Tensor") -> "Tensor":
    """GGUF's blocks out of bytes [N, groups, 16] and exponents [N, groups]: an exponent lies before
    its values, and a byte has values that are 16 apart instead of neighbours."""
    import torch

    values = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(2)
    bytes_ = values[..., : GROUP // 2] | (values[..., GROUP // 2 :] << 4)
    return torch.cat((scales[..., None], bytes_), dim=-1).flatten(1)


def read(settings: Mapping[str, Any]) -> Scheme:
    """Out of a ``quantization_config``."""
    del settings
    return Mxfp4()
