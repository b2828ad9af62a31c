"""Builds the native kernels: ``python -m precast.ops.build`` writes ``precast/ops/_native.so``.

One shared library holds every instruction set, and ``dispatch.cpp`` chooses at run time. Of some
sets all kernels are compiled, of others only what gains by them. The build is incremental: objects
are kept under the name of a digest of their inputs.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from precast.system.cgroup import cpus_paid_for

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_native.so"

ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512vnni",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
}
ISA_FLAGS["avxvnni"] = [*ISA_FLAGS["avx2"], "-mavxvnni"]
ISA_FLAGS["amx"] = [
    *ISA_FLAGS["avx512"],
    "-mavx512bf16",
    "-mamx-tile",
    "-mamx-int8",
    "-mamx-bf16",
]
WHOLE_SETS = ("scalar", "avx2", "avx512")
COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# g++ 12 takes its own AVX-512 intrinsics for uses of uninitialised values.
KERNEL_FLAGS = ["-O3", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def compiler() -> str:
    """The C++ compiler to use: ``$CXX`` or g++."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"precast: no C++ compiler: {name} is not on PATH")
    return found


def _kernels(name: str, source: str, isa: str, flags: Sequence[str]) -> tuple[str, Path, list[str]]:
    own = [*KERNEL_FLAGS, *flags, f"-DPRECAST_ISA={isa}", *ISA_FLAGS[isa]]
    return name, SOURCES / f"{source}.cpp", own


def _units() -> list[tuple[str, Path, list[str]]]:
    """Compilation units: object name, source, flags."""
    import torch
    from torch.utils import cpp_extension

    torch_flags = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    torch_flags += ["-O2", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    units = [_kernels(f"kernels_{isa}", "kernels_impl", isa, ()) for isa in WHOLE_SETS]
    units += [_kernels(f"kernels_{isa}", f"kernels_{isa}", isa, ()) for isa in ("avxvnni", "amx")]
    # Without contraction: of sampling every instruction set has to give the same bits, of attention
    # every number of rows.
    exactly = ("-ffp-contract=off",)
    units += [
        _kernels(f"attention_{isa}", "attention_impl", isa, exactly)
        for isa in (*WHOLE_SETS, "avxvnni", "amx")
    ]
    units += [_kernels(f"sampling_{isa}", "sampling_impl", isa, exactly) for isa in WHOLE_SETS]
    units += [_kernels(f"lora_{isa}", "lora_impl", isa, ()) for isa in WHOLE_SETS]
    units += [
        (n, SOURCES / f"{n}.cpp", ["-O2"])
        for n in ("pool", "dispatch", "comm", "comm_segment", "sampling")
    ]
    torch_units = (
        "ops",
        "attention_ops",
        "experts",
        "gguf_ops",
        "elementwise_ops",
        "comm_ops",
        "sampling_ops",
        "sampling_split",
        "step_runner",
        "lora",
    )
    units += [(n, SOURCES / f"{n}.cpp", torch_flags) for n in torch_units]
    return units


def _digest(parts: list[str], source: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() + b"\0")
    for path in [source, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile(cxx: str, unit: tuple[str, Path, list[str]], objects: Path) -> Path:
    name, source, flags = unit
    digest = _digest([cxx, *COMMON_FLAGS, *flags], source)
    target = objects / f"{name}-{digest}.o"
    if not target.exists():
        print(f"precast: compiling {name}", flush=True)
        partial = target.with_suffix(".tmp")
        subprocess.run(
            [cxx, *COMMON_FLAGS, *flags, "-c", str(source), "-o", str(partial)], check=True
        )
        partial.rename(target)
    return target


def build(objects: Path, library: Path = LIBRARY, extra: Sequence[str] = ()) -> Path:
    """Compiles what has changed, with ``extra`` flags, and links ``library``; returns its path.
    Raises CalledProcessError."""
    import torch

    cxx = compiler()
    objects.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=cpus_paid_for()) as pool:
        units = [(name, source, [*flags, *extra]) for name, source, flags in _units()]
        built = list(pool.map(lambda unit: _compile(cxx, unit, objects), units))
    stamp = objects / "linked"
    names = "\n".join(path.name for path in built)
    if library.exists() and stamp.exists() and stamp.read_text() == names:
        return library
    partial = library.with_suffix(".tmp")
    lib = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", "-lrt", "-pthread"]
    subprocess.run(
        [cxx, "-shared", *extra, "-o", str(partial), *map(str, built), *libraries], check=True
    )
    partial.rename(library)
    stamp.write_text(names)
    for stale in set(objects.glob("*.o")) - set(built):
        stale.unlink()
    return library


def main() -> None:
    default = Path(__file__).parents[2] / "build" / "native"
    try:
        print(f"precast: native kernels ready: {build(default)}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"precast: building the native kernels failed (exit code {error.returncode})")


if __name__ == "__main__":
    main()
