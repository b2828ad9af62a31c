"""Captures one decode graph: ``python -m precast.graphs.capture --out DIR < factors.json``.

Runs as a child process of the compile worker, so that a crash, a hang or a compile that eats the
memory takes down nothing else. Writes ``graph.pt2`` and ``report.json`` into DIR and a JSON line on
stdout for each stage. Exit codes: 0 captured and verified, 2 the factors were refused, 3 the graph
differs from eager; 2 and 3 with one line on stderr.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precast.errors import CaptureFailed, InvalidRequest
from precast.graphs.scratch import scratch_folder

if TYPE_CHECKING:
    from precast.graphs.capture_models import Part
    from precast.graphs.verify_peers import Group
    from precast.models.blocks import Shape

MAX_PARTS = 64
"""Compiled parts that are kept; those that were not used for longest go."""
VERIFY_LAYERS = 2
TIMED_STEPS = 20
VERIFY_STEPS = 2 * 4 + TIMED_STEPS
"""Steps in a verification: each of the four cases of _context_cases twice, and the timed ones."""
EXACT_BOUND = 1e-4
QUANTIZED_BOUND = 3e-2
"""Largest |graph - eager| / max |eager| of logits and cache entries.

fp32 sums come out in another order: about 1e-6 was seen. With quantised activations or a
quantised cache such a difference can move a value across a rounding step, 1/127 of a row's largest:
up to 6e-3 was seen."""

TARGETS = {
    "x86-64-v2": (None, 0),
    "x86-64-v3": ("VecAVX2", 256),
    "x86-64-v4": ("VecAVX512", 512),
}
"""For each target: Inductor's vector class and its width in bits."""


def inductor_options(isa: str) -> dict[str, Any]:
    """Settings of a capture. Part of the graph's key, but for the output's place."""
    return {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.enable_line_tables": False,
        # A graph's own kernels are norms and activations of a few KB: a fork costs more than it
        # saves. The operators have threads of their own, so no thread count is baked in.
        "cpp.threads": 1,
        "cpp.march": isa,
        "cpp.simdlen": TARGETS[isa][1],
        "cpp.vec_isa_ok": True,
    }


@cache
def build_factors() -> dict[str, str]:
    """The compiler's share of a graph's key. Cheap: imports no torch. Raises CaptureFailed."""
    name = os.environ.get("CXX", "g++")
    try:
        version = subprocess.run(
            [name, "-dumpfullversion"], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise CaptureFailed(f"no usable C++ compiler: {name}: {error}") from error
    flags = {isa: inductor_options(isa) for isa in TARGETS}
    return {
        "compiler": f"{Path(name).name} {version}",
        "flags": json.dumps(flags, sort_keys=True, separators=(",", ":")),
    }


def progress(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


def capture(factors: Mapping[str, str], out: Path, kept: Path | None = None) -> dict[str, float]:
    """Exports, compiles, packages and verifies; returns the report. ``kept``: a folder for what
    captures share. Raises InvalidRequest, CaptureFailed."""
    from precast.graphs.capture_models import verification_plan
    from precast.graphs.factors import check_versions, shape_from, start_provider
    from precast.graphs.verify_peers import stand_ins

    start_provider(factors)
    check_versions(factors)
    shape, batch_size = shape_from(factors), int(factors["batch_size"])
    layers = len(verification_plan(shape, VERIFY_LAYERS))
    with stand_ins(shape, batch_size, layers, VERIFY_STEPS) as group:
        return _capture(factors, shape, group, out, kept)


def _capture(
    factors: Mapping[str, str], shape: "Shape", group: "Group", out: Path, kept: Path | None
) -> dict[str, float]:
    import torch

    from precast.graphs import capture_models

    batch_size = int(factors["batch_size"])
    generator = torch.Generator().manual_seed(0)
    parts = capture_models.parts(shape, batch_size, int(factors["block_size"]), generator)
    progress("compiling")
    started = time.monotonic()
    _select_target(factors["isa"])
    _see_through()
    files = {part.name: _compiled(part, factors, kept) for part in parts}
    _package(files, out / "graph.pt2")
    compile_s = time.monotonic() - started
    progress("verifying")
    started = time.monotonic()
    error, step_us = verify(factors, out / "graph.pt2", group)
    return {
        "max_relative_error": error,
        "step_us": step_us,
        "compile_s": compile_s,
        "verify_s": time.monotonic() - started,
    }


def _export(part: "Part") -> Any:
    import torch

    with torch.no_grad():
        # One entry for the module's *args, which holds one for each tensor.
        return torch.export.export(
            part.module, part.inputs, dynamic_shapes=(part.dynamic,), strict=False
        )


def _select_target(isa: str) -> None:
    """Makes Inductor generate for ``isa`` whatever this machine has, and run no compiler probes.

    With simdlen alone it would take the first class of that width that *this* CPU supports, AMX
    included. This process does nothing but this capture, so the patch reaches nothing else.
    """
    from torch._inductor import cpu_vec_isa

    name = TARGETS[isa][0]
    chosen = [getattr(cpu_vec_isa, name)()] if name else []
    cpu_vec_isa.valid_vec_isa_list = lambda: chosen  # type: ignore[assignment]


def _compiled(part: "Part", factors: Mapping[str, str], kept: Path | None) -> list[str]:
    """The part's files: those of an earlier capture if it is shared and ``kept`` has them."""
    if kept is None or not part.shared:
        return _compile(_export(part), part, inductor_options(factors["isa"]))
    root = kept / "parts"
    folder = root / _part_digest(part, factors)
    if not folder.is_dir():
        with scratch_folder(root / ".tmp", "part") as scratch:
            for name in _compile(_export(part), part, inductor_options(factors["isa"])):
                shutil.copy(name, scratch)
            with contextlib.suppress(OSError):  # another capture was first
                scratch.rename(folder)
        _prune(root)
    os.utime(folder)
    return [str(path) for path in sorted(folder.iterdir())]


def _part_digest(part: "Part", factors: Mapping[str, str]) -> str:
    wanted = {name: value for name, value in factors.items() if name != "batch_size"}
    text = json.dumps([part.name, wanted, build_factors()], sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _prune(root: Path) -> None:
    parts = [path for path in root.iterdir() if path.name != ".tmp"]
    for path in sorted(parts, key=lambda p: p.stat().st_mtime, reverse=True)[MAX_PARTS:]:
        shutil.rmtree(path, ignore_errors=True)


def _share_headers(folder: Path) -> None:
    """Keeps Inductor's precompiled headers between captures: making them takes 16 s, more than the
    9 s that they save within one. Only this worker writes the folder."""
    from torch._inductor import codecache

    codecache._HEADER_DIR = str(folder)
    codecache._HEADER_LOCK_DIR = str(folder / "locks")


def _compile(program: Any, part: "Part", options: dict[str, Any]) -> list[str]:
    import torch._inductor

    with torch.no_grad():
        files: Any = torch._inductor.aot_compile(
            program.module(), part.inputs, options={**options, **_direct_calls()}
        )
    # The sources go: they would double the package and are not needed to load it.
    return [name for name in files if not str(name).endswith(".cpp")]


def _see_through() -> None:
    """Gives Inductor the definitions of the small operators, so that it fuses them with their
    neighbours; others are called."""
    import torch
    from torch._inductor.decomposition import decompositions

    from precast.ops import providers

    for name, function in providers.seen_through().items():
        decompositions[getattr(torch.ops.precast, name).default] = function


def _direct_calls() -> dict[str, Any]:
    """Lets graphs call our own kernels by symbol instead of through the dispatcher (``shims.h``).
    Another provider's are called through it, where ``providers.start`` has put them."""
    import torch

    from precast.ops import providers

    def shim(name: str, arguments: str) -> list[str]:
        return [f"AOTITorchError aoti_torch_cpu_{name}({arguments}, AtenTensorHandle* ret)"]

    def tensors(names: str) -> str:
        return ", ".join(f"AtenTensorHandle {name}" for name in names.split())

    ops = torch.ops.precast
    tail = ", AtenTensorHandle* bias, int64_t out_features, int64_t format"
    paged = tensors("q k v k_cache v_cache slots query_starts context_lens block_tables")
    shims = {
        ops.embedding.default: shim(
            "embedding", tensors("ids weight") + ", int64_t features, int64_t format"
        ),
        ops.linear.default: shim("linear", tensors("x weight") + tail),
        ops.paged_attention.default: shim(
            "paged_attention", paged + ", double scale, int64_t window, double softcap"
        ),
        ops.all_reduce.default: shim("all_reduce", tensors("x")),
        ops.all_gather.default: shim(
            "all_gather", tensors("x") + ", const int64_t* widths, int64_t widths_len"
        ),
        ops.broadcast.default: shim("broadcast", tensors("x") + ", int64_t root"),
    }
    selection = providers.active()
    native = {op: text for op, text in shims.items() if selection.is_native(op._opname)}
    return {"aot_inductor.custom_ops_to_c_shims": native}


def _package(files: dict[str, list[str]], target: Path) -> None:
    from torch._inductor.package.package import package_aoti

    package_aoti(str(target), files)  # type: ignore[arg-type]


def verify(factors: Mapping[str, str], package: Path, group: "Group") -> tuple[float, float]:
    """Replays against eager on random and edge inputs. Returns the largest relative difference and
    the median step time of a model of VERIFY_LAYERS layers, microseconds. Raises CaptureFailed."""
    import torch

    from precast.graphs import capture_models as models
    from precast.graphs.difference import relative_difference
    from precast.graphs.factors import ISA_LEVELS, shape_from
    from precast.graphs.replay import Graph
    from precast.models.kv_cache import read_cache
    from precast.models.weights import random_weights
    from precast.ops import providers
    from precast.ops.native import native_isa

    if list(ISA_LEVELS.values()).index(factors["isa"]) > list(ISA_LEVELS.values()).index(
        ISA_LEVELS[native_isa()]
    ):
        raise CaptureFailed(f"this CPU can't run {factors['isa']}, so the graph can't be verified")
    shape, batch, block = (
        shape_from(factors),
        int(factors["batch_size"]),
        int(factors["block_size"]),
    )
    generator = torch.Generator().manual_seed(1)
    plan = models.verification_plan(shape, VERIFY_LAYERS)
    weights = random_weights(shape, plan, models.CAPTURE_POSITIONS, generator)
    caches = [models.random_cache(shape, block, generator) for _ in plan]
    eager_caches = [type(c)(c.k.clone(), c.v.clone()) for c in caches]
    cases = _context_cases(batch, block)
    worst = 0.0
    group.join()
    with torch.inference_mode():
        graph = Graph(package, batch, shape, weights, caches)
        for contexts in cases:
            inputs = models.step_inputs(shape, block, contexts, generator)
            live = torch.tensor(contexts) > 0
            expected = models.eager_step(shape, inputs, weights, eager_caches)[live]
            actual = graph.replay(inputs.token_ids, inputs.positions, inputs.paging)[live]
            pairs = [(actual, expected)]
            for ours, theirs in zip(caches, eager_caches, strict=True):
                pairs += zip(read_cache(ours), read_cache(theirs), strict=True)
            worst = max(worst, *(relative_difference(a, b) for a, b in pairs))
        times = []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            graph.replay(inputs.token_ids, inputs.positions, inputs.paging)
            times.append(time.perf_counter() - start)
    exact = shape.exact and not providers.active().rounds
    bound = EXACT_BOUND if exact else QUANTIZED_BOUND
    if not worst <= bound:
        raise CaptureFailed(f"graph differs from eager by {worst:.2e}, more than {bound:.0e}")
    return worst, statistics.median(times) * 1e6


def _context_cases(batch: int, block: int) -> list[list[int]]:
    """Context lengths to verify with: alike, at block edges, mixed, and with padded rows."""
    edges = [1, 2, block - 1, block, block + 1, 3 * block, 4 * block - 1]
    return [
        [5] * batch,
        [edges[row % len(edges)] for row in range(batch)],
        [(row * 37) % (4 * block) + 1 for row in range(batch)],
        [7 + row if row <= batch // 2 else 0 for row in range(batch)],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="precast.graphs.capture")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--kept", type=Path, help="keep here what captures share: precompiled headers, parts"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    # A private cache: nothing that another process left behind can get into an artifact.
    scratch = out / "inductor"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if arguments.kept is not None:
        _share_headers(arguments.kept / "headers")
    try:
        report = capture(json.load(sys.stdin), out, arguments.kept)
    except (InvalidRequest, KeyError, ValueError) as error:
        print(f"spec refused: {error}", file=sys.stderr)
        return 2
    except CaptureFailed as error:
        print(str(error), file=sys.stderr)
        return 3
    shutil.rmtree(scratch, ignore_errors=True)
    (out / "report.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
