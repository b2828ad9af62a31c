"""What this machine's CPU can do, as the kernel names it."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_AVX512: Final = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AVXVNNI: Final = frozenset({"avx2", "fma", "avx_vnni"})
_AMX: Final = frozenset({"amx_tile", "amx_int8", "amx_bf16"})


@dataclass(frozen=True, kw_only=True)
class Cpu:
    model: str
    flags: frozenset[str]
    """Names of ``/proc/cpuinfo``."""

    @property
    def avx512(self) -> bool:
        """Foundation, byte and word, doubleword, vector length: x86-64-v4."""
        return self.flags >= _AVX512

    @property
    def avxvnni(self) -> bool:
        """Sums of products of bytes, in vectors of AVX2."""
        return self.flags >= _AVXVNNI

    @property
    def amx(self) -> bool:
        return self.flags >= _AMX


_LEFT_OUT: Final = {
    "avx512": ("amx",),
    "avxvnni": ("avx512", "avx10", "amx"),
    "avx2": ("avx512", "avx10", "avx_vnni", "amx"),
    "scalar": ("avx", "amx", "fma", "f16c"),
}
"""Beginnings of the flags that a lesser instruction set does without."""


@cache
def this_cpu() -> Cpu:
    """This machine's CPU; a lesser one where ``PRECAST_NATIVE_ISA`` says so, as for the kernels."""
    cpu = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    return narrowed(cpu, os.environ.get("PRECAST_NATIVE_ISA", ""))


def narrowed(cpu: Cpu, isa: str) -> Cpu:
    """The CPU without what goes beyond an instruction set of the native kernels."""
    beyond = _LEFT_OUT.get(isa, ())
    flags = frozenset(flag for flag in cpu.flags if not flag.startswith(tuple(beyond)))
    return Cpu(model=cpu.model, flags=flags)


def parse_cpuinfo(text: str) -> Cpu:
    """The first processor of a ``/proc/cpuinfo``."""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    values = {name.strip(): value.strip() for name, _, value in lines}
    return Cpu(
        model=values.get("model name", "unknown"),
        flags=frozenset(values.get("flags", "").split()),
    )
