"""Writes requirements.lock and requirements-dev.lock: exact versions of what is installed here.

Usage: ``python scripts/lock.py``, in an environment whose versions have passed the tests. The locks
name the packages that ``pyproject.toml`` asks for and all that these need, and no index: where pip
finds them is the business of each user's own configuration.
"""

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT: Final = Path(__file__).resolve().parents[1]
ALWAYS: Final = ("setuptools",)
"""Needed to install the project itself without network access."""
HEAD: Final = """\
# Exact versions that are tested together. Written by `make lock`; change pyproject.toml instead.
"""


def closure(wanted: Iterable[str]) -> dict[str, str]:
    """Name and version of the requirements and of all that they need."""
    pins: dict[str, str] = {}
    pending = [Requirement(text) for text in wanted]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        requirement = pending.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            raise SystemExit(f"{requirement.name} is not installed: run make setup") from None
        # without the local part: +cpu says which index a wheel came from
        pins[key[0]] = Version(found.version).public
        pending += _needs(found.requires or (), requirement.extras)
    return pins


def _needs(requires: Iterable[str], extras: Iterable[str]) -> list[Requirement]:
    environments = [{"extra": extra} for extra in ("", *extras)]
    requirements = [Requirement(text) for text in requires]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None
        or any(requirement.marker.evaluate(environment) for environment in environments)
    ]


def write(path: Path, pins: dict[str, str], head: str = "") -> None:
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    path.write_text(HEAD + head + "".join(lines))


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = closure([*project["dependencies"], *ALWAYS])
    write(ROOT / "requirements.lock", run)
    dev = closure(project["optional-dependencies"]["dev"])
    extra = {name: version for name, version in dev.items() if name not in run}
    write(ROOT / "requirements-dev.lock", extra, "-r requirements.lock\n")


if __name__ == "__main__":
    main()
