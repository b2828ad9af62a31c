"""Turns the C++ that Inductor generates into shared objects.

Inductor's own build compiles, for every model of a package, AOTInductor's runtime interface and a
regular expression engine (for the word "cpu") along with the few calls that the graph consists of:
5 s of g++ where the graph itself takes 0.8 s. Both are the same in every graph. Here they are one
object, built once for each target (``interface.o``), and so are two precompiled headers.

``Build.folder`` is what captures share; it belongs to one compile worker. Its entries are named by
a digest of all that went into them and appear by a rename, under a lock.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path

from precast.errors import CaptureFailed

COMMON_FLAGS = (
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-DNDEBUG",
    "-DTORCH_INDUCTOR_CPP_WRAPPER",
    "-DSTANDALONE_TORCH_HEADER",
    "-DTORCH_INDUCTOR_PRECOMPILE_HEADERS",
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
)
CALLS_FLAGS = ("-O1",)
"""For the code that calls operators and kernels one after the other."""
KERNEL_FLAGS = (
    "-O3",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=off",
    "-fexcess-precision=fast",
    "-fno-tree-loop-vectorize",
)
"""For norms and activations: those of Inductor's flags that have an effect."""
TARGET_FLAGS = {
    "x86-64-v2": (),
    "x86-64-v3": ("-DCPU_CAPABILITY_AVX2",),
    "x86-64-v4": ("-DCPU_CAPABILITY_AVX512",),
}
"""Beside ``-march``: what ATen's vector classes are chosen by. No instruction beyond the level is
allowed, so a graph runs on every CPU of its level; VNNI and AMX are the operators' business."""

COMPILE_TIMEOUT_S = 600.0

_STRING_ITERATOR = "std::string::const_iterator"
_SUB_MATCHES = f"std::allocator<std::sub_match<{_STRING_ITERATOR}>>"
_REGEX = (
    "class std::__cxx11::basic_regex<char>",
    "class std::__detail::_Compiler<std::regex_traits<char>>",
    "class std::__detail::_Scanner<char>",
    "class std::__detail::_NFA<std::regex_traits<char>>",
    f"bool std::__detail::__regex_algo_impl<{_STRING_ITERATOR}, {_SUB_MATCHES}, char, "
    f"std::regex_traits<char>>({_STRING_ITERATOR}, {_STRING_ITERATOR}, "
    f"std::match_results<{_STRING_ITERATOR}>&, const std::regex&, "
    "std::regex_constants::match_flag_type, std::__detail::_RegexExecutorPolicy, bool)",
)
"""What ``parse_device_str``, inline in AOTInductor's header, makes of libstdc++'s templates."""


def _templates(declaration: str) -> str:
    """The regex templates, declared or defined. The names are libstdc++ 12's; with another one each
    object gets its own, as it would anyhow."""
    lines = "".join(f"{declaration} {name};\n" for name in _REGEX)
    return f"#if _GLIBCXX_RELEASE == 12\n{lines}#endif\n"


CALLS_HEADER = "#include <torch/csrc/inductor/aoti_include/cpu.h>\n#include <regex>\n" + _templates(
    "extern template"
)
KERNEL_HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
_INTERFACE_TAIL = _templates("template") + (
    # The graph's constants: there are none, weights are inputs.
    'asm(".data\\n.balign 64\\n'
    ".globl _binary_constants_bin_start\\n_binary_constants_bin_start:\\n"
    '.globl _binary_constants_bin_end\\n_binary_constants_bin_end:\\n.text\\n");\n'
)
_INTERFACE_END = '} // extern "C"\n'
"""Where AOTInductor's C interface, the same in every wrapper, ends."""
_METADATA = {"AOTI_DEVICE_KEY": "cpu", "AOTI_PLATFORM": "linux", "AOTI_MACHINE": "x86_64"}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    """Name and version, for example "g++ 12.2.0". Raises CaptureFailed."""
    return _version_of(compiler())


@cache
def _version_of(name: str) -> str:
    try:
        version = subprocess.run(
            [name, "-dumpfullversion"], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise CaptureFailed(f"no usable C++ compiler: {name}: {error}") from error
    return f"{Path(name).name} {version}"


def write_metadata(shared_object: Path) -> None:
    """Writes what the loader reads first, beside the shared object."""
    text = json.dumps(_METADATA)
    shared_object.with_name(f"{shared_object.stem}_metadata.json").write_text(text)


def files(folder: Path, name: str) -> list[Path]:
    """What a package holds of a model."""
    dispatched = folder / f"{name}.json"
    found = [dispatched] if dispatched.exists() else []
    return [folder / f"{name}.so", folder / f"{name}_metadata.json", *found]


@dataclass(frozen=True, kw_only=True)
class Build:
    """Builds code for one target."""

    isa: str
    folder: Path
    """What captures share: precompiled headers and the interface."""
    work: Path
    """This capture's own files."""
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2), init=False)

    def prepare(self) -> None:
        """Starts to precompile the headers if they are missing. Does not wait."""
        for header, flags in ((CALLS_HEADER, CALLS_FLAGS), (KERNEL_HEADER, KERNEL_FLAGS)):
            self._pool.submit(self._precompiled, header, flags)

    def start(self, name: str, wrapper: str, kernels: str) -> "Future[Path]":
        """Compiles and links one model's code; the future gives its shared object, or raises
        CaptureFailed."""
        interface, found, calls = wrapper.partition(_INTERFACE_END)
        if not found:
            raise CaptureFailed("generated code has no AOTInductor interface")
        objects = [
            self._pool.submit(self._shared_object, interface + found + _INTERFACE_TAIL),
            self._pool.submit(self._own_object, f"{name}.calls", calls, CALLS_HEADER, CALLS_FLAGS),
            self._pool.submit(
                self._own_object, f"{name}.kernels", kernels, KERNEL_HEADER, KERNEL_FLAGS
            ),
        ]
        return self._pool.submit(self._link, name, objects)

    def _own_object(self, name: str, code: str, header: str, flags: Sequence[str]) -> Path:
        source, target = self.work / f"{name}.cpp", self.work / f"{name}.o"
        source.write_text(code)
        pch = self._precompiled(header, flags)
        # By its name alone: __FILE__ is in the code.
        self._run([*self._flags(flags), "-include", str(pch), "-c", source.name, "-o", str(target)])
        return target

    def _shared_object(self, code: str) -> Path:
        with self._shared("interface.o", code, CALLS_FLAGS) as (target, partial):
            if partial:
                source = partial.with_suffix(".cpp")
                source.write_text(CALLS_HEADER + code)
                self._run([*self._flags(CALLS_FLAGS), "-c", source.name, "-o", str(partial)])
        return target

    def _precompiled(self, header: str, flags: Sequence[str]) -> Path:
        """The header's path; its precompiled form lies beside it, where the compiler looks."""
        with self._shared("h.gch", header, flags) as (target, partial):
            source = target.with_suffix("")
            if partial:
                source.write_text(header)
                self._run(
                    [*self._flags(flags), "-x", "c++-header", str(source), "-o", str(partial)]
                )
        return source

    @contextmanager
    def _shared(
        self, kind: str, content: str, flags: Sequence[str]
    ) -> Iterator[tuple[Path, Path | None]]:
        """An entry's path and, if it has to be made, where to make it."""
        all_flags = self._flags(flags)
        digest = blake2b(
            json.dumps([compiler_version(), all_flags, content]).encode(), digest_size=16
        )
        target = self.folder / f"{digest.hexdigest()}.{kind}"
        if target.exists():
            yield target, None
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go should we be killed
            if target.exists():
                yield target, None
                return
            partial = self.work / f"{target.name}.tmp"
            yield target, partial
            # Over file systems a rename is no rename: copied beside it first.
            beside = target.with_name(f"{target.name}.tmp")
            shutil.move(partial, beside)
            beside.rename(target)

    def _link(self, name: str, objects: "Sequence[Future[Path]]") -> Path:
        target = self.work / f"{name}.so"
        _, libraries = _torch_folders()
        paths = [str(done.result()) for done in objects]
        libs = [f"-L{libraries}", "-Wl,--as-needed", "-ltorch_cpu"]
        self._run(["-shared", "-s", "-o", str(target), *paths, *libs])
        write_metadata(target)
        return target

    def _flags(self, flags: Sequence[str]) -> list[str]:
        includes, _ = _torch_folders()
        return [
            *COMMON_FLAGS,
            f"-march={self.isa}",
            *TARGET_FLAGS[self.isa],
            *flags,
            *(f"-I{path}" for path in includes),
            f"-ffile-prefix-map={includes[0]}=torch",  # else where torch lies is in the code
        ]

    def _run(self, arguments: Sequence[str]) -> None:
        try:
            done = subprocess.run(
                [compiler(), *arguments],
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_S,
                cwd=self.work,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CaptureFailed(f"C++ compiler: {error}") from error
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line]
            reason = said[0] if said else f"exit code {done.returncode}"
            raise CaptureFailed(f"C++ compiler: {reason}")


def _torch_folders() -> tuple[tuple[Path, ...], Path]:
    """Torch's include folders and its library folder."""
    import torch

    root = Path(torch.__file__).parent
    include = root / "include"
    return (include, include / "torch" / "csrc" / "api" / "include"), root / "lib"
