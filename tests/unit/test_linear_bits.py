"""Linears give the same bits on every instruction set that has multiply-add."""

import pytest

from precast.ops import native
from precast.system.cpu import this_cpu
from tests.support.other_isa import output_with
from tests.unit.test_amx import linear_digest

SETS = {"avx2": {"avx2", "fma"} <= this_cpu().flags, "avxvnni": this_cpu().avxvnni}
OTHERS = [isa for isa, there in SETS.items() if there and isa != native.native_isa()]
"""Of AVX-512 and AMX: ``test_amx.py``."""


@pytest.mark.skipif(native.native_isa() == "scalar", reason="rounds products")
@pytest.mark.parametrize("isa", OTHERS)
def test_linears_have_the_same_bits(isa: str) -> None:
    program = "from tests.unit.test_amx import linear_digest; print(linear_digest())"
    assert output_with(isa, "-c", program).strip() == linear_digest()
