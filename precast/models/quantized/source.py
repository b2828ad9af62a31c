"""A checkpoint's tensors; those of quantised linears as ``ScaledWeight`` or a file's blocks."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from precast.models.quantized.mxfp4 import Mxfp4
from precast.models.quantized.scheme import Files, Scheme
from precast.ops.gguf_blocks import FileWeight, RawRows
from precast.ops.gguf_types import GgufType
from precast.ops.scaled import Weight

_TYPES: Final = {
    torch.float32: GgufType.F32,
    torch.float16: GgufType.F16,
    torch.bfloat16: GgufType.BF16,
}


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    files: Files
    scheme: Scheme

    def get(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Raises ModelCorrupt if the tensor is missing or of another shape."""
        module = name.removesuffix(".weight")
        if len(shape) == 2 and self.scheme.is_stored(module, self.files.names):
            return self.scheme.read(self.files, module, (shape[0], shape[1]))
        found = self.files.get(name, shape)
        if self.scheme.quantization == "file" and len(shape) == 2 and module != name:
            return _as_it_is(found)
        return found

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> Weight:
        """One of the linears in a tensor [experts, inputs, outputs], as [outputs, inputs]."""
        if isinstance(self.scheme, Mxfp4) and self.scheme.is_stored(name, self.files.names):
            return self.scheme.expert(self.files, name, index, shape)
        return self.files.expert(name, index, shape)


def _as_it_is(weight: Tensor) -> Weight:
    """Floats that stay what they are where a packed weight says of what type it is."""
    if weight.dtype not in _TYPES:
        return weight
    rows = weight.contiguous().view(torch.uint8)
    return FileWeight([RawRows(_TYPES[weight.dtype], weight.shape[1], rows)])
