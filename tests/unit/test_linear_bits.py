"""Linears give the same bits on every instruction set that has multiply-add."""

import os
import subprocess
import sys

import pytest

from precast.ops import native
from precast.system.cpu import this_cpu
from tests.unit.test_amx import linear_digest

SETS = {"avx2": {"avx2", "fma"} <= this_cpu().flags, "avxvnni": this_cpu().avxvnni}
OTHERS = [isa for isa, there in SETS.items() if there and isa != native.native_isa()]
"""Of AVX-512 and AMX: ``test_amx.py``."""


@pytest.mark.skipif(native.native_isa() == "scalar", reason="rounds products")
@pytest.mark.parametrize("isa", OTHERS)
def test_linears_have_the_same_bits(isa: str) -> None:
    program = "from tests.unit.test_amx import linear_digest; print(linear_digest())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PRECAST_NATIVE_ISA": isa},
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    assert run.stdout.strip() == linear_digest()
