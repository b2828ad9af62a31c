"""The folder tree is the architecture: imports run one way."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SERVICES = ("gateway", "decode_worker", "compile_worker")
COME_ALONG = {
    *("google", "grpc", "grpc_health", "grpc_reflection", "opentelemetry"),
    *("pydantic_core", "starlette"),
}
"""Modules of packages that are asked for under another name, or that these bring."""
Edges = dict[str, set[str]]


@cache
def modules() -> dict[str, Path]:
    """Every module of ``precast`` and ``services`` but the generated ones."""
    paths = [path for top in ("precast", "services") for path in (ROOT / top).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
        if "_pb2" not in path.name
    }


def imports(path: Path) -> Iterator[str]:
    """Names of what a file imports, wherever in it; for types alone doesn't count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what only a type checker sees is no import
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else node.module


@cache
def edges() -> Edges:
    return {
        name: {imported for imported in imports(path) if imported.startswith(("precast", "serv"))}
        for name, path in modules().items()
    }


def siblings(package: str) -> Edges:
    """Which children of a package, modules and folders alike, import which others."""
    found: Edges = {}
    prefix = f"{package}."
    for name, imported in edges().items():
        if name.startswith(prefix):
            child = name.removeprefix(prefix).split(".")[0]
            others = {
                other.removeprefix(prefix).split(".")[0]
                for other in imported
                if other.startswith(prefix)
            }
            found.setdefault(child, set()).update(others - {child})
    return found


def cycle(graph: Edges) -> list[str]:
    """A cycle of the graph; empty if there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := search(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def packages() -> list[str]:
    return sorted({name.rpartition(".")[0] for name in modules()} - {""})


def reached(start: str) -> set[str]:
    """All modules that those below ``start`` import, and what these import in turn."""
    seen: set[str] = set()
    pending = [name for name in modules() if f"{name}.".startswith(f"{start}.")]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += edges().get(name, set()) & modules().keys()
    return seen


def test_a_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", packages())
def test_no_folder_imports_in_a_circle(package: str) -> None:
    assert cycle(siblings(package)) == []


def test_precast_imports_no_service() -> None:
    assert {name for name in reached("precast") if name.startswith("services.")} == set()


@pytest.mark.parametrize("service", SERVICES)
def test_services_share_only_what_is_in_precast(service: str) -> None:
    others = tuple(f"services.{other}." for other in SERVICES if other != service)
    assert {name for name in reached(f"services.{service}") if name.startswith(others)} == set()


@pytest.mark.parametrize("service", ["gateway", "decode_worker"])
def test_what_serves_imports_no_capture_code(service: str) -> None:
    found = reached(f"services.{service}")
    assert len(found) > 20
    assert {name for name in found if name.startswith("precast.graphs.capture")} == set()


def third_party(start: str) -> set[str]:
    """Packages of others that what ``start`` reaches imports."""
    found = {name.split(".")[0] for module in reached(start) for name in imports(modules()[module])}
    return found - set(sys.stdlib_module_names) - {"precast", "services"}


@pytest.mark.parametrize(
    ("service", "extras"),
    [
        ("gateway", ["gateway", "telemetry"]),
        ("decode_worker", ["worker", "telemetry"]),
        ("compile_worker", ["worker", "compiler"]),
    ],
)
def test_a_service_needs_only_what_its_extras_install(service: str, extras: list[str]) -> None:
    """The gateway's image has neither torch nor transformers, a decode worker's no transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    installed = {Requirement(text).name.replace("-", "_") for asked in lists for text in asked}
    assert third_party(f"services.{service}") - installed <= COME_ALONG


def test_generated_code_has_a_folder_of_its_own() -> None:
    assert {path.relative_to(ROOT).parts[1] for path in (ROOT / "precast").rglob("*_pb2*.py")} == {
        "proto"
    }
