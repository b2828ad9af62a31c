"""Compares a graph's outputs with eager's, and keeps what differs."""

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from precast.errors import CaptureFailed
from precast.graphs.capture.verify.failure import (
    FAILURE_FILE,
    FOLDER,
    MAX_LENGTHS,
    MAX_TENSOR_BYTES,
    TENSORS_FILE,
    Mismatch,
)
from precast.graphs.difference import relative_difference

Outputs = Mapping[str, tuple[Tensor, Tensor]]
"""By name: the graph's and eager's."""


def compare(
    outputs: Outputs,
    *,
    bound: float,
    case: str,
    seed: int,
    inputs: Mapping[str, Tensor],
    folder: Path,
) -> float:
    """The largest relative difference. ``inputs`` has "context_lens" among its tensors.

    Beyond ``bound`` the case is written below ``folder`` and ``CaptureFailed`` raised.
    """
    differences = {name: relative_difference(*pair) for name, pair in outputs.items()}
    output = max(differences, key=differences.__getitem__)
    if differences[output] <= bound:
        return differences[output]
    index = _worst(*outputs[output])
    mismatch = Mismatch(
        case=case,
        seed=seed,
        context_lens=tuple(inputs["context_lens"][:MAX_LENGTHS].tolist()),
        bound=bound,
        differences={n: d if math.isfinite(d) else -1.0 for n, d in differences.items()},
        output=output,
        index=index,
        actual=_finite(outputs[output][0][index]),
        expected=_finite(outputs[output][1][index]),
    )
    _keep(folder / FOLDER, mismatch, inputs, outputs[output])
    raise CaptureFailed(mismatch.text)


def _worst(actual: Tensor, expected: Tensor) -> tuple[int, ...]:
    """Where they differ most; a NaN differs more than anything."""
    apart = (actual - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    place = int(apart.argmax())
    return tuple(int(at) for at in torch.unravel_index(torch.tensor(place), apart.shape))


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _keep(
    folder: Path, mismatch: Mismatch, inputs: Mapping[str, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    row = mismatch.index[:-1]
    tensors = {**inputs, "actual": pair[0][row], "expected": pair[1][row]}
    small = {
        name: tensor.contiguous().clone()
        for name, tensor in tensors.items()
        if tensor.nbytes <= MAX_TENSOR_BYTES
    }
    folder.mkdir(exist_ok=True)
    save_file(small, folder / TENSORS_FILE)
    (folder / FAILURE_FILE).write_bytes(msgspec.json.encode(mismatch))
