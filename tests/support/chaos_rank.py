"""A simulated rank that wants graphs, and looks at each one's every byte when it is to load it.

``CHAOS_SET`` in the environment is the number of the set of graphs that it wants.
"""

import os
from pathlib import Path

from tests.support import simulated_rank
from tests.support.capture_program import factors_of
from tests.support.compile_worker import FACTORS


def set_factors(number: int) -> dict[str, str]:
    """The factors of a set's graphs, without the batch size."""
    factors = {name: value for name, value in FACTORS.items() if name != "num_tokens"}
    return {**factors, "graph_source": f"{number:016x}"}


def refusal(wanted: dict[str, str], graph: Path) -> str | None:
    found = factors_of(graph)
    if found is None:
        return f"{graph} is not what a capture has written"
    if not wanted.items() <= found.items():
        return f"{graph} was captured for {found}"
    return None


if __name__ == "__main__":
    factors = set_factors(int(os.environ["CHAOS_SET"]))
    simulated_rank.main(factors, lambda graph: refusal(factors, graph))
