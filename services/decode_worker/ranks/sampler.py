"""Draws the tokens of a step's sequences: columns by slot for ``precast.ops.sampling``.

What doesn't change while a sequence lives is set once (``start``). Counts for penalties are kept
here, so that a step only names slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precast.ops.draw_status import DrawStatus
from precast.ops.sampling import INTS, REALS, ByRow, Columns, Drawings, sample
from services.decode_worker.ranks.banned_sequences import BannedSequences
from services.decode_worker.ranks.protocol import Logprobs, Masks, StartSampling
from services.decode_worker.ranks.token_biases import NO_BIAS, Bias, SlotBias, slot_bias, without
from services.decode_worker.ranks.token_counts import TokenCounts

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
_STEP: Final = INTS.index("step")
_LOGPROBS: Final = INTS.index("logprobs")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Of the sequences that drew, in their order."""

    tokens: list[int]
    """-1 where there is none."""
    logprobs: list[Logprobs | None]
    failed: dict[int, int]
    """Status of those without a token (``DrawStatus``), by place."""


@dataclass(frozen=True, kw_only=True)
class DrawMasks:
    words: Tensor
    """int32 [masks, ceil(V / 32)]."""
    rows: Tensor
    """int32 [S]: each row's mask, -1 for none."""


def draw_masks(message: Masks, places: Ints, draws: int) -> DrawMasks | None:
    """``places`` [M] of the masked ones among so many draws. None where all of them have ended
    while the step was under way: nobody is told of what they draw."""
    if message.width == 0:
        return None
    rows = np.full(draws, -1, dtype=np.int32)
    rows[places] = _ids(message.rows)
    words = _ids(message.words).reshape(-1, message.width).copy()  # torch wants them writable
    return DrawMasks(words=torch.from_numpy(words), rows=torch.from_numpy(rows))


@dataclass(kw_only=True)
class Sampler:
    """State of ``slots`` sequences."""

    slots: int
    widths: tuple[int, ...] = ()
    """Of each rank's part of the vocabulary, where this is one of several."""
    reports: bool = True
    """Whether this one has to report log-probabilities."""
    _reals: NDArray[np.float64] = field(init=False)
    _ints: NDArray[np.int64] = field(init=False)
    _counts: dict[int, TokenCounts] = field(default_factory=dict, init=False)
    """By slot, of sequences with penalties."""
    _biases: dict[int, SlotBias] = field(default_factory=dict, init=False)
    """By slot, of sequences with a bias."""
    _banned: dict[int, BannedSequences] = field(default_factory=dict, init=False)
    """By slot, of sequences whose output must not have some others in it."""
    _biased: tuple[list[Bias], ByRow] | None = field(default=None, init=False)
    """The last step's biases: mostly the next step's too."""

    def __post_init__(self) -> None:
        self._reals = np.zeros((self.slots, len(REALS)))
        self._ints = np.zeros((self.slots, len(INTS)), dtype=np.int64)

    def start(self, message: StartSampling) -> None:
        """A sequence gets a slot."""
        slot = message.slot
        self._reals[slot] = [getattr(message, name) for name in REALS]
        seed = np.uint64(message.seed).astype(np.int64)
        self._ints[slot] = (message.top_k, seed, 0, message.logprobs, -1)
        self._counts.pop(slot, None)
        self._biases.pop(slot, None)
        self._banned.pop(slot, None)
        self._biased = None
        if _penalises(message):
            prompt, output = _ids(message.prompt_token_ids), _ids(message.output_token_ids)
            self._counts[slot] = TokenCounts(prompt, output)
        if message.bias_token_ids or message.min_tokens:
            self._biases[slot] = slot_bias(message)
        if message.banned_sequences:
            output = _ids(message.output_token_ids)
            self._banned[slot] = BannedSequences(message.banned_sequences, output)

    def draw(
        self, logits: Tensor, slots: Ints, drawn: Ints, masks: DrawMasks | None = None
    ) -> Drawn:
        """float32 [S, V] logits of this rank's part of the vocabulary, which are changed, to
        tokens. ``slots`` [S] are the rows', and ``drawn`` [S] how many tokens each sequence has
        drawn before. All ranks take part, and draw the same tokens."""
        ints = self._ints[slots]
        ints[:, _STEP] = drawn
        rows = slots.tolist()
        columns = Columns(
            reals=torch.from_numpy(self._reals[slots]),
            ints=torch.from_numpy(ints),
            seen=self._seen(rows),
            bias=self._bias(rows, drawn.tolist()),
            masks=masks.words if masks else None,
            mask_rows=masks.rows if masks else None,
        )
        wanted: list[int] = ints[:, _LOGPROBS].tolist()
        result = sample(logits, columns, max(0, *wanted), widths=self.widths)
        tokens: list[int] = result.tokens.tolist()
        self._count(rows, tokens)
        found = reports(result, tokens, wanted) if self.reports else []
        return Drawn(tokens=tokens, logprobs=found, failed=_failed(result))

    def _count(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        for kept in (self._counts, self._banned):
            if kept:
                _add(kept, rows, tokens)

    def _seen(self, rows: Sequence[int]) -> ByRow | None:
        found = [self._counts.get(slot) for slot in rows] if self._counts else []
        if not any(found):
            return None
        ids = [counts.ids if counts else _NO_IDS for counts in found]
        return _by_row(ids, [counts.counts if counts else _NO_IDS for counts in found])

    def _bias(self, rows: Sequence[int], drawn: Sequence[int]) -> ByRow | None:
        if not any(slot in self._biases or slot in self._banned for slot in rows):
            return None
        found = [self._bias_of(*row) for row in zip(rows, drawn, strict=True)]
        if self._biased is None or self._biased[0] != found:
            entries = _by_row([bias.ids for bias in found], [bias.values for bias in found])
            self._biased = (found, entries)
        return self._biased[1]

    def _bias_of(self, slot: int, drawn: int) -> Bias:
        bias = self._biases[slot].at(drawn) if slot in self._biases else NO_BIAS
        banned = self._banned.get(slot)
        return bias if banned is None else without(bias, banned.forbidden)


_NO_IDS: Final = np.empty(0, dtype=np.int32)


def _add(
    kept: Mapping[int, TokenCounts] | Mapping[int, BannedSequences],
    rows: Sequence[int],
    tokens: Sequence[int],
) -> None:
    for slot, token in zip(rows, tokens, strict=True):
        if token >= 0 and (one := kept.get(slot)) is not None:
            one.add(token)


def _penalises(message: StartSampling) -> bool:
    return bool(
        message.repetition_penalty != 1 or message.presence_penalty or message.frequency_penalty
    )


def _ids(data: bytes) -> Ints:
    return np.frombuffer(data, dtype=np.int32)


def _by_row(ids: list[Ints], values: list[Ints] | list[Floats]) -> ByRow:
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return ByRow(
        starts=torch.from_numpy(starts),
        ids=torch.from_numpy(np.concatenate(ids)),
        values=torch.from_numpy(np.concatenate(values)),
    )


def _failed(result: Drawings) -> dict[int, int]:
    status: list[int] = result.status.tolist()
    return {row: code for row, code in enumerate(status) if code != DrawStatus.DRAWN}


def reports(
    result: Drawings, tokens: Sequence[int], wanted: Sequence[int]
) -> list[Logprobs | None]:
    """Of each row: so many likeliest tokens as are wanted, -1 for no report at all."""
    if max(wanted) < 0:
        return [None] * len(tokens)
    columns = (result.logprobs, result.top_ids, result.top_logprobs)
    rows = zip(*(column.tolist() for column in columns), tokens, wanted, strict=True)
    return [
        _row_logprobs(logprob, ids, scores) if count >= 0 and token >= 0 else None
        for logprob, ids, scores, token, count in rows
    ]


def _row_logprobs(logprob: float, ids: list[int], scores: list[float]) -> Logprobs:
    found = tuple(token for token in ids if token >= 0)
    return Logprobs(logprob=logprob, top_ids=found, top_logprobs=tuple(scores[: len(found)]))
