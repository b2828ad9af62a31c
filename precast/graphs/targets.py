"""What graphs are compiled for, and with which settings. Imports no torch."""

import json
from typing import Any

from precast.graphs import code_build

TARGETS = {
    "x86-64-v2": (None, 0),
    "x86-64-v3": ("VecAVX2", 256),
    "x86-64-v4": ("VecAVX512", 512),
}
"""For each target, least first: Inductor's vector class and its width in bits."""


def runs(cpu: str, isa: str) -> bool:
    """Whether a CPU of one level runs a graph's code for another; not where either is unknown."""
    return isa == cpu or isa in lesser(cpu)


def lesser(isa: str) -> list[str]:
    """The levels below, best first."""
    levels = list(TARGETS)
    return levels[: levels.index(isa)][::-1] if isa in levels else []


def inductor_options(isa: str) -> dict[str, Any]:
    """Settings of Inductor's code generation. Part of the graph's key."""
    return {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.enable_line_tables": False,
        # A graph's own kernels are norms and activations of a few KB: a fork costs more than it
        # saves. The operators have threads of their own, so no thread count is baked in.
        "cpp.threads": 1,
        "cpp.simdlen": TARGETS[isa][1],
        "cpp.vec_isa_ok": True,
        # Checks for a debugging variable; they take longer to compile than the graph.
        "size_asserts": False,
    }


def build_factors() -> dict[str, str]:
    """The compiler's share of a graph's key. Raises CaptureFailed."""
    flags = {
        "code": {isa: inductor_options(isa) for isa in TARGETS},
        "common": code_build.COMMON_FLAGS,
        "calls": code_build.CALLS_FLAGS,
        "kernels": code_build.KERNEL_FLAGS,
        "targets": code_build.TARGET_FLAGS,
    }
    return {
        "compiler": code_build.compiler_version(),
        "flags": json.dumps(flags, sort_keys=True, separators=(",", ":")),
    }
