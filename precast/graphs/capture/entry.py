"""Captures one graph: ``python -m precast.graphs.capture.entry --out DIR < factors.json``.

The compile worker forks it off a process that has called ``preload``. It is a process of its own,
so that a crash, a hang or a compile that eats the memory takes down nothing else. Writes
``graph.pt2`` and ``report.json`` into DIR and a JSON line on stdout for each stage. Exit codes: 0
captured, and verified if this CPU runs it; 2 the factors were refused; 3 the graph differs from
eager; 2 and 3 with one line on stderr.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from precast.errors import CaptureFailed, InvalidRequest
from precast.graphs.capture.build import Build, files, write_metadata
from precast.graphs.capture.compiler import build_factors
from precast.graphs.capture.object_cache import PartCache, part_key
from precast.graphs.targets import runs

if TYPE_CHECKING:
    from precast.graphs.capture.export import Part
    from precast.graphs.capture.verify.peers import Group
    from precast.models.layers import Shape


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a capture works."""

    out: Path
    """Its own: what it makes, and everything that is only of use meanwhile."""
    kept: Path
    """What captures of one compile worker share: precompiled headers, parts."""


def progress(stage: str) -> None:
    print(json.dumps({"stage": stage}), flush=True)


def capture(factors: Mapping[str, str], folders: Folders) -> dict[str, float]:
    """Exports, compiles, packages and verifies; returns the report. What this CPU can't run is not
    verified: a worker that can run it has to try it first. Raises InvalidRequest, CaptureFailed."""
    from precast.graphs.capture.verify.cases import planned
    from precast.graphs.capture.verify.peers import stand_ins
    from precast.graphs.factors import check_versions, shape_from, start_provider

    start_provider(factors)
    check_versions(factors)
    shape = shape_from(factors)
    steps = planned(shape, int(factors["num_tokens"]), int(factors["block_size"]))
    build = Build(isa=factors["isa"], folder=folders.kept / "objects", work=folders.out)
    with stand_ins(shape, steps) as group:
        build.prepare()
        return _capture(factors, shape, group, build, folders)


def _capture(
    factors: Mapping[str, str], shape: "Shape", group: "Group", build: Build, folders: Folders
) -> dict[str, float]:
    from precast.graphs.capture.verify.runner import verify
    from precast.graphs.factors import ISA_LEVELS
    from precast.ops.native import native_isa

    progress("compiling")
    started = time.monotonic()
    _compile(factors, _parts(factors, shape), build, folders)
    compiled = time.monotonic()
    if not runs(ISA_LEVELS[native_isa()], factors["isa"]):
        return {"compile_s": compiled - started, "verified": False}
    progress("verifying")
    error, layer_us = verify(factors, folders.out / "graph.pt2", group)
    return {
        "max_relative_error": error,
        "layer_us": layer_us,
        "compile_s": compiled - started,
        "verify_s": time.monotonic() - compiled,
    }


def _parts(factors: Mapping[str, str], shape: "Shape") -> "list[Part]":
    import torch

    from precast.graphs.capture import export

    generator = torch.Generator().manual_seed(0)
    return export.parts(shape, int(factors["num_tokens"]), int(factors["block_size"]), generator)


def _compile(
    factors: Mapping[str, str], parts: "Sequence[Part]", build: Build, folders: Folders
) -> None:
    """Makes the package. C++ is compiled while Inductor works on the next part."""
    from precast.graphs.capture import codegen

    cache = PartCache(folder=folders.kept / "parts")
    codegen.prepare(factors["isa"])
    running: dict[str, Future[Path]] = {}
    keys = {part.name: part_key(part.name, factors, build_factors()) for part in parts}
    to_keep = set[str]()
    for part in parts:
        done = folders.out / f"{part.name}.so"
        if part.shared and cache.get(keys[part.name], done):
            write_metadata(done)
            continue
        code = codegen.generate(part, factors["isa"])
        running[part.name] = build.start(part.name, code.wrapper, code.kernels)
        if code.dispatched:
            (folders.out / f"{part.name}.json").write_text(code.dispatched)
        elif part.shared:
            to_keep.add(part.name)
    for name, future in running.items():
        made = future.result()
        if name in to_keep:
            cache.put(keys[name], made)
    _package([part.name for part in parts], folders.out)


def _package(names: Sequence[str], folder: Path) -> None:
    from torch._inductor.package.package import package_aoti

    paths = {name: [str(path) for path in files(folder, name)] for name in names}
    package_aoti(str(folder / "graph.pt2"), paths)  # type: ignore[arg-type]


def preload() -> None:
    """Does what any capture would do first, so that forks of this process need not: imports, and
    what Inductor puts off until it is first used. Leaves no threads."""
    from precast.graphs.factors import graph_source
    from precast.models.options import OPTIONS

    for name in OPTIONS:
        graph_source(name)  # of what is imported here, whatever is installed over it later
    with tempfile.TemporaryDirectory() as scratch:
        _set_environment(Path(scratch))

        from precast.graphs.capture import codegen

        codegen.warm_up()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy what it looks at


def _set_environment(cache: Path) -> None:
    """For Inductor: a private cache, so that nothing that another process left behind can get into
    an artifact, and no compilers of its own."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def main() -> int:
    parser = argparse.ArgumentParser(prog="precast.graphs.capture.entry")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--kept", type=Path, help="keep here what captures share: precompiled headers, parts"
    )
    arguments = parser.parse_args()
    folders = Folders(out=arguments.out, kept=arguments.kept or arguments.out / "kept")
    scratch = folders.out / "inductor"
    _set_environment(scratch)
    try:
        report = capture(json.load(sys.stdin), folders)
    except (InvalidRequest, KeyError, ValueError) as error:
        print(f"spec refused: {error}", file=sys.stderr)
        return 2
    except CaptureFailed as error:
        print(str(error), file=sys.stderr)
        return 3
    shutil.rmtree(scratch, ignore_errors=True)
    (folders.out / "report.json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
