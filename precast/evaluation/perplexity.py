"""How much quantisation costs: perplexity on a text, and how often a model's first choice is that
of its fp32 weights.

The text is cut into windows of equal length, each read from an empty cache, so that results don't
depend on the machine's speed, on services or on chance.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from precast.errors import ConfigError
from precast.models.config import load_config
from precast.models.forward import hidden_states, logits
from precast.models.kv_cache import new_cache
from precast.models.layers import Paging
from precast.models.load import load_weights
from precast.models.precision import Precision
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.tokenizer.load import load_tokenizer

TEXT: Final = Path(__file__).with_name("text.txt")
BLOCK_SIZE: Final = 32
_ROWS: Final = 64
"""Tokens whose logits exist at once."""


@dataclass(frozen=True, kw_only=True)
class Score:
    precision: Precision
    weight_bytes: int
    tokens: int
    """Tokens that were predicted."""
    perplexity: float
    perplexity_change: float
    """Relative to the fp32 weights: 0.01 is one per cent more."""
    top1_agreement: float
    """Share of tokens before which the likeliest next token is that of the fp32 weights."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    weight_bytes: int
    loss: float
    """Mean negative log likelihood of a token."""
    choices: Tensor
    """int64 [tokens]"""


def windows(folder: Path, text: str, length: int) -> list[Tensor]:
    """The text's tokens in windows; each begins with what the tokenizer puts before a text, and a
    remainder is left out. Raises ConfigError if the text is shorter than a window."""
    tokenizer = load_tokenizer(folder)
    prefix = tokenizer.encode("").ids
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    size = length - len(prefix)
    if size < 2 or len(ids) < size:
        raise ConfigError(f"window = {length}: the text has {len(ids)} tokens")
    starts = range(0, len(ids) - size + 1, size)
    return [torch.tensor(prefix + ids[start : start + size]) for start in starts]


def evaluate(
    folder: Path, precisions: Sequence[Precision], text: str, length: int
) -> Iterator[Score]:
    """A score for each precision, as they are done; the fp32 weights are run first in any case.

    Raises ConfigError, and what loading a model raises.
    """
    parts = windows(folder, text, length)
    exact = _run(folder, Precision(), parts)
    for precision in precisions:
        run = exact if precision == Precision() else _run(folder, precision, parts)
        yield Score(
            precision=precision,
            weight_bytes=run.weight_bytes,
            tokens=len(run.choices),
            perplexity=math.exp(run.loss),
            perplexity_change=math.exp(run.loss - exact.loss) - 1,
            top1_agreement=float((run.choices == exact.choices).double().mean()),
        )


def _run(folder: Path, precision: Precision, parts: Sequence[Tensor]) -> _Run:
    config = load_config(folder)
    share = shard(config, 0, 1)
    shape = shape_of(config, share, precision)
    length = len(parts[0])
    if length > config.max_position_embeddings:
        raise ConfigError(
            f"window = {length} exceeds the model's {config.max_position_embeddings} positions"
        )
    weights = load_weights(folder, config, share, shape, length)
    blocks = -(-length // BLOCK_SIZE)
    caches = [
        new_cache(
            shape.kv_dtype,
            blocks=blocks,
            kv_heads=shape.kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=shape.head_dim,
        )
        for _ in config.layers
    ]
    paging = Paging(
        slots=torch.arange(length, dtype=torch.int32),
        query_starts=torch.tensor([0, length], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
    )
    losses, choices = [], []
    with torch.inference_mode():
        for part in parts:
            hidden = hidden_states(shape, weights, caches, part, torch.arange(length), paging)
            targets = part[1:].split(_ROWS)
            for rows, wanted in zip(hidden[:-1].split(_ROWS), targets, strict=True):
                scores = logits(shape, weights, rows)
                losses.append(torch.nn.functional.cross_entropy(scores, wanted, reduction="none"))
                choices.append(scores.argmax(-1))
    return _Run(
        weight_bytes=weights.nbytes(),
        loss=float(torch.cat(losses).double().mean()),
        choices=torch.cat(choices),
    )
