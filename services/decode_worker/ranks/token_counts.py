"""Which tokens a sequence has had, and how often: what penalties go by."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
ROOM = 64
"""Tokens that there is room for at first; it doubles."""


class TokenCounts:
    """Distinct tokens of prompt and output, each with its count in the output. Adding a token costs
    the same however many there are."""

    def __init__(self, prompt: Ints, output: Ints) -> None:
        ids, places = np.unique(np.concatenate((prompt, output)), return_inverse=True)
        self._size = len(ids)
        self._ids = np.resize(ids.astype(np.int32), self._size + ROOM)
        self._counts = np.zeros(self._size + ROOM, dtype=np.int32)
        np.add.at(self._counts, places[len(prompt) :], 1)
        self._places = {token: place for place, token in enumerate(ids.tolist())}

    def add(self, token: int) -> None:
        """A token of the output."""
        place = self._places.setdefault(token, self._size)
        if place == self._size:
            self._append(token)
        self._counts[place] += 1

    @property
    def ids(self) -> Ints:
        return self._ids[: self._size]

    @property
    def counts(self) -> Ints:
        """In the output, by ``ids``; 0: only in the prompt."""
        return self._counts[: self._size]

    def _append(self, token: int) -> None:
        if self._size == len(self._ids):
            self._ids = np.resize(self._ids, 2 * self._size)
            self._counts = np.concatenate((self._counts, np.zeros(self._size, dtype=np.int32)))
        self._ids[self._size], self._counts[self._size] = token, 0
        self._size += 1
