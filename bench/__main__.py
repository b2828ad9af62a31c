"""Runs benchmarks: ``python -m bench [NAME [its options]]``; without a name, all of them.

Each is a module of this folder with a ``main``. They print tables; nothing is asserted. Run them on
an idle machine: they compare what alternates in one run, but a busy neighbour still blurs it.
"""

import runpy
import sys
from pathlib import Path

NAMES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in NAMES:
        sys.exit(f"no benchmark {arguments[0]!r}: there are {', '.join(NAMES)}")
    for name in arguments[:1] or NAMES:
        sys.argv = [f"bench.{name}", *arguments[1:]]
        runpy.run_module(f"bench.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
