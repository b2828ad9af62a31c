"""Bytes that are no longer what they were."""

import random
from collections.abc import Callable
from typing import Final

Damage = Callable[[random.Random, bytes, int], bytes]
"""Of bytes, at a place in them."""


def cut(_: random.Random, data: bytes, at: int) -> bytes:
    return data[:at]


def flip(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def insert(rng: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]


_WAYS: Final[tuple[Damage, ...]] = (cut, flip, insert)


def damaged(rng: random.Random, data: bytes, *others: Damage) -> bytes:
    """Damaged in one of the ways above, or in one of ``others``."""
    data = data or b"\n"
    at = rng.randrange(len(data))
    return rng.choice((*_WAYS, *others))(rng, data, at)
