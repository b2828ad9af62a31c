"""What a request has added to the logits of single tokens: its bias, and -inf where a token must
not be drawn."""

from collections.abc import Collection, Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from precast.errors import InvalidRequest
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.engine.ranges import check_range

MAX_BIAS: Final = 100.0
MAX_BIAS_ENTRIES: Final = 1 << 16
"""Half a megabyte to the rank. Vocabularies may be larger, but no client names them all."""
MAX_BANNED_TOKENS: Final = 1 << 13
"""Of all banned sequences."""


def token_biases(
    given: pb.SamplingParams, vocab_size: int, early: Collection[int]
) -> tuple[bytes, bytes]:
    """int32 ids, which rise, and their float32 values. ``early``: tokens that are not drawn at
    first either. Raises InvalidRequest, naming the field."""
    if not (given.logit_bias or given.allowed_token_ids or given.banned_token_ids):
        return b"", b""
    bias = _bias(given, vocab_size)
    if given.allowed_token_ids or given.banned_token_ids:
        forbidden = _forbidden(given, vocab_size)
        bias[forbidden] = -np.inf
        forbidden[[token for token in early if token < vocab_size]] = True
        forbidden[_ids("banned_sequences", _last_tokens(given), vocab_size)] = True
        if forbidden.all():
            raise InvalidRequest("allowed_token_ids: no token is left that may be drawn")
    ids = np.flatnonzero(~np.isnan(bias))  # in this order for the rank's caches
    return ids.astype(np.int32).tobytes(), bias[ids].tobytes()


def banned_sequences(given: pb.SamplingParams, vocab_size: int) -> tuple[bytes, ...]:
    """int32 ids of each. Raises InvalidRequest, naming the field."""
    sequences = [one.token_ids for one in given.banned_sequences]
    if (count := sum(map(len, sequences))) > MAX_BANNED_TOKENS:
        raise InvalidRequest(f"banned_sequences has {count} tokens: at most {MAX_BANNED_TOKENS}")
    if not all(sequences):
        raise InvalidRequest("banned_sequences: one is empty")
    found = (_ids("banned_sequences", ids, vocab_size) for ids in sequences)
    return tuple(ids.astype(np.int32).tobytes() for ids in found)


def _last_tokens(given: pb.SamplingParams) -> list[int]:
    """Those that may be forbidden at some place."""
    return [one.token_ids[-1] for one in given.banned_sequences if one.token_ids]


def _bias(given: pb.SamplingParams, vocab_size: int) -> NDArray[np.float32]:
    """[V] of each token, NaN where none is given."""
    count = len(given.logit_bias)
    if count > MAX_BIAS_ENTRIES:
        raise InvalidRequest(f"logit_bias has {count} entries: at most {MAX_BIAS_ENTRIES}")
    bias = np.full(vocab_size, np.nan, dtype=np.float32)
    ids = _ids("logit_bias", given.logit_bias.keys(), vocab_size)
    values = np.fromiter(given.logit_bias.values(), dtype=np.float32, count=count)
    wrong = np.flatnonzero(~(np.abs(values) <= MAX_BIAS))
    if wrong.size:
        name, value = f"logit_bias of token {ids[wrong[0]]}", float(values[wrong[0]])
        check_range(name, value, -MAX_BIAS, MAX_BIAS)
    bias[ids] = values
    return bias


def _forbidden(given: pb.SamplingParams, vocab_size: int) -> NDArray[np.bool_]:
    """[V]"""
    forbidden = np.full(vocab_size, bool(given.allowed_token_ids))
    forbidden[_ids("allowed_token_ids", given.allowed_token_ids, vocab_size)] = False
    forbidden[_ids("banned_token_ids", given.banned_token_ids, vocab_size)] = True
    return forbidden


def _ids(name: str, given: Iterable[int], vocab_size: int) -> NDArray[np.int64]:
    ids = np.fromiter(given, dtype=np.int64)
    if ids.size and (largest := int(ids.max())) >= vocab_size:
        raise InvalidRequest(f"{name}: token id {largest} is outside of the vocabulary")
    return ids
