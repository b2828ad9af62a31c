"""A token's logits are the same bits whatever runs beside it and however its prompt is cut.

Graphs against eager steps: ``tests/integration/test_captured_architectures.py``.
"""

import os

import pytest

from precast.ops import native
from tests.support import same_bits
from tests.support.other_isa import output_with

# Without AVX-VNNI, which differs from AVX2 in its linears only: tests/unit/test_linear_bits.py.
LESSER = {
    "amx": ("avx512", "avx2", "scalar"),
    "avx512": ("avx2", "scalar"),
    "avxvnni": ("avx2", "scalar"),
    "avx2": ("scalar",),
    "scalar": (),
}


def test_bits_do_not_depend_on_the_step() -> None:
    assert same_bits.failures() == []


@pytest.mark.parametrize("isa", LESSER[native.native_isa()])
def test_nor_do_they_on_lesser_instruction_sets(isa: str) -> None:
    if os.environ.get("PRECAST_NATIVE_ISA"):
        pytest.skip("one is chosen for all tests")
    assert output_with(isa, "-m", "tests.support.same_bits").split("\n") == ["", ""]
