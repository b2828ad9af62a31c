"""Tokens that may stand anywhere within a JSON string, and which of them an automaton takes.

*Plain* tokens are whole characters with nothing among them that JSON would escape. Their characters
make a tree, a level for each place, so that tokens that begin alike are gone through together; all
of an automaton's states go through it at once.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.decode_worker.constraints.automata import DEAD, Automaton
from services.decode_worker.constraints.characters import LAST

Words = NDArray[np.int32]
Numbers = NDArray[np.int32]
LONGEST: Final = 32
"""Characters of a plain token; the few longer ones are none."""
MOST_WORK: Final = 40_000_000
"""Places of the tree times states, looked at before a level is gone through: 0.3 to 0.8 s."""
_AT_ONCE: Final = 1 << 20
"""Of those, so that numbers on the way take a few MB."""
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f\x7f]+')
_HALF: Final = re.compile(rb"\xf4(?:[\x80-\x8f][\x80-\xbf]{0,2})?\Z")
_LAST_BYTES: Final = chr(LAST).encode()


class TooLarge(Exception):
    """It would take too long."""


@dataclass(frozen=True, kw_only=True)
class _Level:
    """A place in tokens, and all that stands there behind what stands in front."""

    parents: Numbers
    """In the level before."""
    characters: Numbers
    """As positions in ``PlainTokens.characters``."""
    ends: Numbers
    """Nodes at which tokens end, and ..."""
    tokens: Numbers
    """... which these are."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Plain tokens that each state takes, without ending up dead."""

    of_state: tuple[int, ...]
    rows: Words
    """[masks, width], a bit for each token."""


class PlainTokens:
    def __init__(self, tokens: Sequence[bytes]) -> None:
        """``tokens``: what each adds to a text. Single bytes are left out."""
        texts = list(map(_text, tokens))
        self.lengths: Final = np.array(list(map(len, texts)), dtype=np.int32)
        """Characters of each; 0 of one that is not plain."""
        self.width: Final = -(-len(tokens) // 32)
        found = sorted((texts[at], at) for at in np.flatnonzero(self.lengths).tolist())
        codes = _codes([text for text, _ in found])
        self.characters: Final = _distinct(codes)
        """Numbers of all that there are."""
        numbers = np.array([at for _, at in found], dtype=np.int32)
        place = np.zeros(LAST + 1, dtype=np.int32)
        place[self.characters] = np.arange(len(self.characters), dtype=np.int32)
        self._levels = list(_levels(place[codes], self.lengths[numbers], numbers))

    def fitting(self, left: int) -> Words:
        """Those of at most so many characters."""
        bits = np.zeros((32 * self.width, 1), dtype=np.bool_)
        bits[: len(self.lengths), 0] = (self.lengths > 0) & (self.lengths <= left)
        found: Words = packed(bits)[0]
        return found

    def masks(self, automaton: Automaton) -> Masks:
        """Raises TooLarge."""
        taken = np.zeros((32 * self.width, len(automaton.targets)), dtype=np.bool_)
        targets = automaton.targets.T.copy()  # [classes, states]
        classes = _classes_of(automaton, self.characters)
        behind = np.arange(targets.shape[1], dtype=np.int16)[None]
        """[nodes, states]: the state behind a node, begun with each."""
        kept, work = np.zeros(1, dtype=np.int32), 0
        for level in self._levels:
            nodes = _reached(level, kept, targets, classes)
            work += len(nodes) * len(automaton.targets)
            if work > MOST_WORK:
                raise TooLarge(f"{work} places")
            kept, behind = _next(level, nodes, kept, behind, targets, classes)
            if not len(behind):
                break
            ends = kept[level.ends]
            alive = ends >= 0
            taken[level.tokens[alive]] = behind[ends[alive]] != DEAD
        rows, of_state = np.unique(packed(taken), axis=0, return_inverse=True)
        return Masks(of_state=tuple(of_state.ravel().tolist()), rows=rows)


def _reached(
    level: _Level, kept: Numbers, targets: NDArray[np.int16], classes: Numbers
) -> NDArray[np.int64]:
    """Nodes of a level behind those that some state gets to, with characters that some state
    takes."""
    goes_on: NDArray[np.bool_] = np.any(targets, axis=1)
    return np.flatnonzero((kept[level.parents] >= 0) & goes_on[classes[level.characters]])


def _next(
    level: _Level,
    nodes: NDArray[np.int64],
    kept: Numbers,
    behind: NDArray[np.int16],
    targets: NDArray[np.int16],
    classes: Numbers,
) -> tuple[Numbers, NDArray[np.int16]]:
    """Where each node of a level is among those that some state gets to, -1 for the others; and the
    states behind those."""
    states = behind.shape[1]
    kept_here = np.full(len(level.parents), -1, dtype=np.int32)
    found, count, step = [behind[:0]], 0, max(1, _AT_ONCE // states)
    for at in range(0, len(nodes), step):
        part = nodes[at : at + step]
        taken = classes[level.characters[part], None]
        here = targets.ravel().take(taken * states + behind[kept[level.parents[part]]])
        alive = here.any(axis=1)
        found.append(here[alive])
        kept_here[part[alive]] = np.arange(count, count + len(found[-1]), dtype=np.int32)
        count += len(found[-1])
    return kept_here, np.concatenate(found)


def packed(bits: NDArray[np.bool_]) -> Words:
    """[tokens, masks] as [masks, words]; bit i % 32 of word i // 32."""
    found = np.packbits(bits, axis=0, bitorder="little")
    return np.ascontiguousarray(found.T).view(np.int32)


def _classes_of(automaton: Automaton, characters: Numbers) -> Numbers:
    ranges = np.searchsorted(np.array(automaton.starts), characters, side="right") - 1
    return np.array(automaton.classes, dtype=np.int32)[ranges]


def _text(token: bytes) -> str:
    """Of a plain token; nothing of another one. Which of the last characters a token begins at its
    end makes no difference: no pattern tells them apart."""
    if len(token) < 2:
        return ""
    try:
        text = _HALF.sub(_LAST_BYTES, token).decode()
    except UnicodeDecodeError:
        return ""
    return text if len(text) <= LONGEST and _PLAIN.fullmatch(text) else ""


def _codes(texts: Sequence[str]) -> Numbers:
    """[texts, LONGEST]: the numbers of their characters, 0 behind them."""
    whole = "".join(text.ljust(LONGEST, "\0") for text in texts).encode("utf-32-le")
    return np.frombuffer(whole, dtype=np.int32).reshape(len(texts), LONGEST)


def _distinct(codes: Numbers) -> Numbers:
    """Sorted."""
    found = np.zeros(LAST + 1, dtype=np.bool_)
    found[codes] = True
    return np.flatnonzero(found).astype(np.int32)


def _levels(characters: Numbers, lengths: Numbers, numbers: Numbers) -> Iterator[_Level]:
    """``characters``: [texts, places]; texts that begin alike are beside each other."""
    alike = np.ones(len(numbers), dtype=np.bool_)
    alike[:1] = False
    """Whether a text begins as the one before, so far."""
    node_of = np.zeros(len(numbers), dtype=np.int32)
    for place in range(int(lengths.max(initial=0))):
        here = characters[:, place]
        alike[1:] &= here[1:] == here[:-1]
        new = (lengths > place) & ~alike
        parents = node_of[new]
        node_of = (np.cumsum(new) - 1).astype(np.int32)
        over = lengths == place + 1
        yield _Level(
            parents=parents, characters=here[new], ends=node_of[over], tokens=numbers[over]
        )
