"""What is kept of a verification that fails: enough to see where, and to try it again by hand.

Weights, caches and inputs come from a fixed seed, so the factors bring all of them back. Kept
beside them are the step's inputs and the row with the largest difference, as tensors that anything
can read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

FOLDER: Final = "failure"
"""In the folder of the capture."""
FAILURE_FILE: Final = "failure.json"
TENSORS_FILE: Final = "tensors.safetensors"
MAX_TENSOR_BYTES: Final = 4 << 20
"""Larger ones are left out."""
MAX_LENGTHS: Final = 64


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """The first case in which a graph differs from eager by too much."""

    case: str
    seed: int
    context_lens: tuple[int, ...]
    """Of the step's sequences; the first MAX_LENGTHS."""
    bound: float
    differences: dict[str, float]
    """By output: largest difference relative to the largest expected value; -1: not finite."""
    output: str
    """The one that differs most."""
    index: tuple[int, ...]
    """Its element that does."""
    expected: float | None
    """Eager's; None: not finite."""
    actual: float | None

    @property
    def text(self) -> str:
        worst = self.differences[self.output]
        by = f"{worst:.2e}" if worst >= 0 else "something that is no number"
        return (
            f"graph differs from eager by {by}, more than {self.bound:.0e}, in {self.output} "
            f"{list(self.index)} of case {self.case!r}: {self.actual} instead of {self.expected}"
        )


def read_mismatch(folder: Path) -> Mismatch | None:
    """What a failed verification left in a capture's folder; None: nothing that can be read."""
    try:
        raw = (folder / FOLDER / FAILURE_FILE).read_bytes()
        return msgspec.json.decode(raw, type=Mismatch)
    except (OSError, msgspec.DecodeError):
        return None


def write_factors(folder: Path, factors: Mapping[str, str]) -> None:
    """As a capture by hand reads them."""
    (folder / "factors.json").write_bytes(msgspec.json.encode(dict(factors)))
