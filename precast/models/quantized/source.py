"""A checkpoint's tensors, with those of quantised linears as ``ScaledWeight``."""

from dataclasses import dataclass

from precast.models.quantized.mxfp4 import Mxfp4
from precast.models.quantized.scheme import Files, Scheme
from precast.ops.scaled import Weight


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint:
    files: Files
    scheme: Scheme

    def get(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Raises ModelCorrupt if the tensor is missing or of another shape."""
        module = name.removesuffix(".weight")
        if len(shape) != 2 or not self.scheme.is_stored(module, self.files.names):
            return self.files.get(name, shape)
        return self.scheme.read(self.files, module, (shape[0], shape[1]))

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> Weight:
        """One of the linears in a tensor [experts, inputs, outputs], as [outputs, inputs]."""
        if isinstance(self.scheme, Mxfp4) and self.scheme.is_stored(name, self.files.names):
            return self.scheme.expert(self.files, name, index, shape)
        return self.files.expert(name, index, shape)
