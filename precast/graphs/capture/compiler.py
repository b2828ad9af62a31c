"""How graphs are compiled: settings of Inductor's code generation, and the compiler's share of a
graph's key. Imports no torch."""

import json
from typing import Any

from precast.graphs.capture import build
from precast.graphs.targets import TARGETS


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
        "common": build.COMMON_FLAGS,
        "calls": build.CALLS_FLAGS,
        "kernels": build.KERNEL_FLAGS,
        "targets": build.TARGET_FLAGS,
    }
    return {
        "compiler": build.compiler_version(),
        "flags": json.dumps(flags, sort_keys=True, separators=(",", ":")),
    }
