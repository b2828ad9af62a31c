"""Generates Python code and type stubs from ``protos/``, or checks that they are up to date.

Usage: ``python scripts/protos.py [--check]``. The generated files are committed, so that nobody
needs the generators to run Precast. protoc derives Python modules from the protos' paths; here the
package ``precast.admin.v1`` becomes the module ``precast.proto.admin.v1``, so that generated code
has a folder of its own.
"""

import os
import re
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Final

from grpc_tools import protoc

ROOT: Final = Path(__file__).resolve().parents[1]
PROTOS: Final = ROOT / "protos"
GENERATED_INTO: Final = ROOT / "precast" / "proto"
IMPORT: Final = re.compile(r"^((?:from|import) )precast\.", re.MULTILINE)
GENERATED: Final = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Write the code of every proto into the folder ``target``. Raises ``SystemExit`` if protoc
    fails."""
    # protoc finds its plug-ins of mypy-protobuf on PATH; they stand next to this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    includes = resources.files("grpc_tools") / "_proto"
    outputs = ("python", "grpc_python", "mypy", "mypy_grpc")
    protos = sorted(path.relative_to(PROTOS) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["protoc", f"-I{PROTOS}", f"-I{includes}"]
        arguments += [f"--{output}_out={folder}" for output in outputs]
        if protoc.main([*arguments, *map(str, protos)]) != 0:
            raise SystemExit("make protos: protoc failed")
        for pattern in GENERATED:
            for path in Path(folder).rglob(pattern):
                _place(path, target / path.relative_to(Path(folder) / "precast"))


def _place(made: Path, place: Path) -> None:
    """Copy a generated file to where it is imported from."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(IMPORT.sub(r"\1precast.proto.", made.read_text()))
    shutil.copymode(made, place)
    for folder in (place.parent, place.parent.parent):
        init = folder / "__init__.py"
        if not init.exists():
            init.write_text('"""Generated code: change protos/ and run `make protos`."""\n')


def differences(expected: Path) -> list[str]:
    """Paths whose committed content is not what was generated, or that protos/ no longer gives."""
    made = _contents(expected)
    committed = _contents(GENERATED_INTO)
    return sorted(path for path in made | committed if made.get(path) != committed.get(path))


def _contents(package: Path) -> dict[str, bytes]:
    return {
        f"precast/proto/{path.relative_to(package)}": path.read_bytes()
        for pattern in GENERATED
        for path in package.rglob(pattern)
    }


def check() -> int:
    """Compare with a fresh generation; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wrong = differences(Path(folder))
    for path in wrong:
        print(f"{path}: differs from what protos/ gives; run `make protos`", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(check())
    generate(GENERATED_INTO)
