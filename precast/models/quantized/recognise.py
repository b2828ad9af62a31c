"""Which scheme a model folder's linears are quantised by."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from precast.errors import UnsupportedArchitecture
from precast.models.json_file import read_object
from precast.models.quantized import awq, compressed, fp8, gptq, mxfp4
from precast.models.quantized.scheme import Scheme

_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Scheme]]] = {
    "awq": awq.read,
    "compressed-tensors": compressed.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "mxfp4": mxfp4.read,
}
"""By ``quant_method``."""
_ENTRIES: Final = ("quantization_config", "compression_config", "quantization")
_OLD_FILES: Final = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote it once, and the scheme that a file belongs to."""


def scheme_of(folder: Path, raw: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a folder whose ``config.json`` is ``raw``; None for floats. Raises
    UnsupportedArchitecture for a scheme that we lack."""
    for entry in _ENTRIES:
        if found := raw.get(entry):
            method = found.get("quant_method") if isinstance(found, dict) else None
            return _read(f"{folder / 'config.json'}: {entry}", method, found)
    for name, method in _OLD_FILES.items():
        if (folder / name).is_file():
            return _read(str(folder / name), method, read_object(folder / name))
    return None


def _read(where: str, method: object, settings: Mapping[str, Any]) -> Scheme:
    if not isinstance(method, str) or method not in _READERS:
        raise UnsupportedArchitecture(
            f"{where} ({ascii(method or 'no quant_method')[:80]}): quantised weights of this kind "
            f"are not supported, only {', '.join(_READERS)}; import the model's float weights, or "
            "a GGUF file"
        )
    try:
        return _READERS[method](settings)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{where} ({method}): {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedArchitecture(f"{where} ({method}): {str(error)[:80]}") from None
