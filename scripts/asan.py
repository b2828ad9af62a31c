"""Runs the kernels' tests under AddressSanitizer: ``python scripts/asan.py [pytest's arguments]``.

Builds the native library with it, and runs the tests in a copy of the tree that has that library:
the one that serves is not touched. The sanitizer is preloaded, because Python is built without it;
first a planted error must be reported, so that a run that says nothing means something.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
BUILD: Final = ROOT / "build" / "asan"
TREE: Final = BUILD / "tree"
FLAGS: Final = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O1")
TESTS: Final = (
    "tests/unit/test_ops.py",
    "tests/unit/test_attention_bits.py",
    "tests/unit/test_linear.py",
    "tests/unit/test_experts.py",
    "tests/unit/test_operator_properties.py",
    "tests/unit/test_providers.py",
    "tests/unit/test_collectives.py",
)
SLOW: Final = "not mixed_collectives and not killed and not collectives_trace"
"""What takes minutes under the sanitizer; the rest covers the same code."""
PLANTED: Final = """
#include <stdlib.h>
extern "C" int planted() {
  volatile char* p = (volatile char*)malloc(16);
  const int value = p[16];
  free((void*)p);
  return value;
}
"""


def copy_tree() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    ignored = shutil.ignore_patterns("_native.so", "__pycache__")
    for name in ("precast", "services", "tests"):
        shutil.copytree(ROOT / name, TREE / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", TREE)


def environment(cxx: str) -> dict[str, str]:
    found = [
        subprocess.run(
            [cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "PYTHONPATH": str(TREE),
        # Both: the sanitizer looks for the C++ runtime's throw before torch has loaded it.
        "LD_PRELOAD": " ".join(found),
        # Python keeps much until its end on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "PYTHONMALLOC": "malloc",
    }


def check_that_errors_are_reported(cxx: str, preload: dict[str, str]) -> None:
    source, library = BUILD / "planted.cpp", BUILD / "planted.so"
    source.write_text(PLANTED)
    subprocess.run([cxx, *FLAGS, "-fPIC", "-shared", "-o", library, source], check=True)
    call = f"import ctypes; ctypes.CDLL({str(library)!r}).planted()"
    run = subprocess.run([sys.executable, "-c", call], env=preload, capture_output=True, text=True)
    if run.returncode != 99 or "heap-buffer-overflow" not in run.stderr:
        sys.exit(f"asan: a planted error was not reported: {run.stderr[-500:]}")


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from precast.ops.build import build, compiler

    copy_tree()
    build(BUILD / "objects", TREE / "precast" / "ops" / "_native.so", FLAGS)
    cxx = compiler()
    preload = environment(cxx)
    check_that_errors_are_reported(cxx, preload)
    chosen = sys.argv[1:] or [*TESTS, "-k", SLOW]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=600"]
    return subprocess.run([*pytest, *chosen], cwd=TREE, env=preload).returncode


if __name__ == "__main__":
    sys.exit(main())
