"""What this machine's CPU can do, as the kernel names it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_AVX512: Final = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
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
    def amx(self) -> bool:
        return self.flags >= _AMX


@cache
def this_cpu() -> Cpu:
    return parse_cpuinfo(Path("/proc/cpuinfo").read_text())


def parse_cpuinfo(text: str) -> Cpu:
    """The first processor of a ``/proc/cpuinfo``."""
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    values = {name.strip(): value.strip() for name, _, value in lines}
    return Cpu(
        model=values.get("model name", "unknown"),
        flags=frozenset(values.get("flags", "").split()),
    )
