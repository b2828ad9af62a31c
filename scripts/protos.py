"""Generates Python code and type stubs from ``protos/``, or checks that they are up to date.

Usage: ``python scripts/protos.py [--check]``. The generated files are committed, so that nobody
needs the generators to run Precast.
"""

import os
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Final

from grpc_tools import protoc

ROOT: Final = Path(__file__).resolve().parents[1]
PROTOS: Final = ROOT / "protos"
GENERATED: Final = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Write the code of every proto below ``target``. Raises ``SystemExit`` if protoc fails."""
    # protoc finds its plug-ins of mypy-protobuf on PATH; they stand next to this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    includes = resources.files("grpc_tools") / "_proto"
    outputs = ("python", "grpc_python", "mypy", "mypy_grpc")
    protos = sorted(path.relative_to(PROTOS) for path in PROTOS.rglob("*.proto"))
    arguments = ["protoc", f"-I{PROTOS}", f"-I{includes}"]
    arguments += [f"--{output}_out={target}" for output in outputs]
    if protoc.main([*arguments, *map(str, protos)]) != 0:
        raise SystemExit("make protos: protoc failed")
    for folder in {target / proto.parent for proto in protos}:
        _make_package(folder, target)


def _make_package(folder: Path, target: Path) -> None:
    """Give the folders between ``target/precast`` and ``folder`` an ``__init__.py``."""
    while folder != target / "precast":
        init = folder / "__init__.py"
        if not init.exists():
            init.write_text('"""Generated code: change protos/ and run `make protos`."""\n')
        folder = folder.parent


def differences(expected: Path) -> list[str]:
    """Paths whose committed content is not what was generated, or that protos/ no longer gives."""
    made = _contents(expected)
    committed = _contents(ROOT / "precast")
    return sorted(path for path in made | committed if made.get(path) != committed.get(path))


def _contents(package: Path) -> dict[str, bytes]:
    return {
        f"precast/{path.relative_to(package)}": path.read_bytes()
        for pattern in GENERATED
        for path in package.rglob(pattern)
    }


def check() -> int:
    """Compare with a fresh generation; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wrong = differences(Path(folder) / "precast")
    for path in wrong:
        print(f"{path}: differs from what protos/ gives; run `make protos`", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(check())
    generate(ROOT)
