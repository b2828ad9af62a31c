"""Sets of characters, as ranges of their numbers."""

from collections.abc import Iterator
from typing import Final

Characters = tuple[tuple[int, int], ...]
"""First and last of each range; sorted, apart, and with something between any two."""
LAST: Final = 0x10FFFF


def one(sign: str) -> Characters:
    return ((ord(sign), ord(sign)),)


def union(*sets: Characters) -> Characters:
    found: list[tuple[int, int]] = []
    for low, high in sorted(each for characters in sets for each in characters):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return tuple(found)


def others(characters: Characters) -> Characters:
    """All that a set has not."""
    return tuple(_between(characters))


def _between(characters: Characters) -> Iterator[tuple[int, int]]:
    at = 0
    for low, high in characters:
        if at < low:
            yield at, low - 1
        at = high + 1
    if at <= LAST:
        yield at, LAST


def has(characters: Characters, number: int) -> bool:
    return any(low <= number <= high for low, high in characters)


ALL: Final[Characters] = ((0, LAST),)
DIGITS: Final[Characters] = ((0x30, 0x39),)
WORDS: Final = union(DIGITS, ((0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)))
SPACES: Final[Characters] = (
    *((0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680)),
    *((0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
