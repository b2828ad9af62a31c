"""``torch.ops.precast.sample``: next tokens for a batch of logits, in one operator.

For each row, in this order:

1. **Penalties**, on tokens that were seen. Repetition divides a positive logit and multiplies any
   other (tokens of prompt and output). Presence is subtracted once, frequency once for each time
   (tokens of the output).
2. **Bias** is added. Then tokens that the **mask** forbids become -inf.
3. **Log probabilities** are of this distribution, before temperature and cuts, as OpenAI reports
   them. Tokens of -inf are not reported.
4. **Temperature** divides the logits. 0 takes the likeliest token, of equals the lowest id, and
   skips the rest.
5. **top_k** keeps the k largest logits (0: all), of equals the lowest ids.
6. **top_p** keeps the fewest of those, likeliest first, whose share reaches it, and always the
   likeliest.
7. **min_p** keeps tokens with at least this share of the likeliest token's probability.
8. **The draw** inverts the cumulative distribution of what is left, in order of ids, at a number
   that depends on (seed, step) alone: the first of Philox4x64-10 with the key (seed, 0) and the
   counter (step + 1, 0, 0, 0).

A row's result depends on nothing but that row: not on the rows beside it, the number of threads or
the instruction set. A row whose logits hold NaN or +inf, or in which nothing is left, gets a status
and no token; the others are drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from precast.ops import native as native  # registers the operators

REALS: Final = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Columns of ``Columns.reals``."""
INTS: Final = ("top_k", "seed", "step", "logprobs", "given")
"""Columns of ``Columns.ints``. ``seed`` and ``step`` are the bits of unsigned numbers.
``logprobs``: likeliest tokens to report, -1 for no log probabilities. ``given``: a token to report
on instead of a draw, -1 to draw."""


@dataclass(frozen=True, kw_only=True)
class ByRow:
    """Token ids with a value each, by row: row s has the entries [starts[s], starts[s + 1])."""

    starts: Tensor
    """int64 [S + 1]."""
    ids: Tensor
    """int32."""
    values: Tensor
    """Of the length of ``ids``: int32 counts in the output (0: only in the prompt), or float32
    biases."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How each of S rows is drawn."""

    reals: Tensor
    """float64 [S, len(REALS)]."""
    ints: Tensor
    """int64 [S, len(INTS)]."""
    seen: ByRow | None = None
    bias: ByRow | None = None
    masks: Tensor | None = None
    """int32 [M, ceil(V / 32)]: bit i % 32 of word i // 32 allows token i."""
    mask_rows: Tensor | None = None
    """int32 [S]: each row's mask, -1 for none."""


@dataclass(frozen=True, kw_only=True)
class Drawings:
    tokens: Tensor
    """int64 [S]; -1 where ``status`` is not DRAWN."""
    status: Tensor
    """int32 [S] (``precast.ops.draw_status``)."""
    logprobs: Tensor
    """float32 [S], of the tokens; 0 where none were asked for."""
    top_ids: Tensor
    """int32 [S, top]; -1 behind a row's last."""
    top_logprobs: Tensor
    """float32 [S, top]."""


def sample(
    logits: Tensor, columns: Columns, top: int = 0, *, widths: Sequence[int] = ()
) -> Drawings:
    """float32 [S, V] logits to tokens; changes the logits in place. ``top`` bounds the rows' own
    number of reported tokens. Raises RuntimeError for columns of the wrong kind.

    ``widths``: how many logits each rank of this process's group has, where these are only this
    rank's. All of them call it with the same columns, which are of the whole vocabulary, and all
    get the same drawings; none gathers the others' logits. A draw may then differ from that of one
    rank where a share is within roundings of a bound.
    """
    if len(widths) > 1:
        outputs = torch.ops.precast.sample_split(*_arguments(logits, columns, top), list(widths))
    else:
        outputs = torch.ops.precast.sample(*_arguments(logits, columns, top))
    names = ("tokens", "status", "logprobs", "top_ids", "top_logprobs")
    return Drawings(**dict(zip(names, outputs, strict=True)))


def _arguments(logits: Tensor, columns: Columns, top: int) -> tuple[Tensor | int | None, ...]:
    seen, bias = columns.seen, columns.bias
    return (
        logits,
        columns.reals,
        columns.ints,
        *((seen.starts, seen.ids, seen.values) if seen else (None, None, None)),
        *((bias.starts, bias.ids, bias.values) if bias else (None, None, None)),
        columns.masks,
        columns.mask_rows,
        top,
    )
