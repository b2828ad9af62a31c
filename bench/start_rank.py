"""A simulated rank that wants graphs, for ``start_together.py``."""

from tests.support import simulated_rank
from tests.support.compile_worker import FACTORS

if __name__ == "__main__":
    simulated_rank.main({name: value for name, value in FACTORS.items() if name != "num_tokens"})
