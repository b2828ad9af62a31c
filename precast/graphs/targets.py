"""What graphs are compiled for, and which CPU runs what."""

TARGETS = {
    "x86-64-v2": (None, 0),
    "x86-64-v3": ("VecAVX2", 256),
    "x86-64-v4": ("VecAVX512", 512),
}
"""For each target, least first: Inductor's vector class and its width in bits."""


def runs(cpu: str, isa: str) -> bool:
    """Whether a CPU of one level runs a graph's code for another; not where either is unknown."""
    return isa == cpu or isa in lesser(cpu)


def lesser(isa: str) -> list[str]:
    """The levels below, best first."""
    levels = list(TARGETS)
    return levels[: levels.index(isa)][::-1] if isa in levels else []
