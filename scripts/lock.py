"""Writes the lock files: exact versions of what is installed here.

``requirements.lock`` has all that runs, ``requirements-dev.lock`` what tests need beside it, and
``deploy/requirements/`` what each image installs. Usage: ``python scripts/lock.py [--check]``, in
an environment whose versions have passed the tests. The locks name the packages that
``pyproject.toml`` asks for and all that these need, and no index: where pip finds them is the
business of each user's own configuration.
"""

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT: Final = Path(__file__).resolve().parents[1]
IMAGES: Final = {
    "gateway": ("gateway", "telemetry"),
    "decode-worker": ("worker", "telemetry"),
    "compile-worker": ("worker", "compiler"),
    "models": ("import",),
}
"""The extras that each image of ``deploy/Dockerfile`` installs."""
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


def text_of(pins: dict[str, str], head: str = "") -> str:
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    return HEAD + head + "".join(lines)


def locks() -> dict[Path, str]:
    """Every lock file and what belongs in it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    base = project["dependencies"]

    def asked(*names: str) -> list[str]:
        """Requirements of extras; what they have in common with others is named as an extra."""
        own = [text for name in names for text in extras[name]]
        others = [Requirement(text) for text in own if Requirement(text).name == project["name"]]
        plain = [text for text in own if Requirement(text).name != project["name"]]
        return plain + [text for other in others for text in asked(*sorted(other.extras))]

    run = closure([*base, *asked("serve"), *ALWAYS])
    dev = closure(extras["dev"])
    more = {name: version for name, version in dev.items() if name not in run}
    found = {
        ROOT / "requirements.lock": text_of(run),
        ROOT / "requirements-dev.lock": text_of(more, "-r requirements.lock\n"),
    }
    for image, names in IMAGES.items():
        pins = closure([*base, *asked(*names)])
        found[ROOT / "deploy" / "requirements" / f"{image}.lock"] = text_of(pins)
    return found


def main() -> int:
    """Writes the locks, or names those that are not up to date; the exit code."""
    stale = {path: text for path, text in locks().items() if _content(path) != text}
    for path, text in stale.items():
        if "--check" in sys.argv[1:]:
            print(f"{path.relative_to(ROOT)}: not what is installed; run `make lock`")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return 1 if stale and "--check" in sys.argv[1:] else 0


def _content(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
