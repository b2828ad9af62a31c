"""Checks a StartGeneration and makes the sequence that the scheduler runs."""

import secrets
from collections.abc import Sequence as Many
from typing import Final

import numpy as np

from precast.errors import InvalidRequest, ModelNotFound
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.engine.pooling import Pooling
from services.decode_worker.engine.ranges import check_range
from services.decode_worker.engine.requested_biases import banned_sequences, token_biases
from services.decode_worker.engine.resume import resumed_output
from services.decode_worker.engine.sequence import SamplingSpec, Sequence

MAX_REQUEST_ID: Final = 128
MAX_STOP_STRINGS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_PENALTY: Final = 2.0
MAX_TEMPERATURE: Final = 100.0
MAX_REPETITION: Final = 100.0
MAX_CACHE_SALT: Final = 256


def make_sequence(
    request_id: str,
    start: pb.StartGeneration,
    *,
    models: Many[str],
    vocab_size: int,
    hidden_size: int,
    eos_token_ids: frozenset[int],
) -> Sequence:
    """``models``: the worker's model, then its adapters. Raises InvalidRequest or ModelNotFound,
    naming the field."""
    if not 0 < len(request_id) <= MAX_REQUEST_ID:
        raise InvalidRequest(f"request_id must have 1 to {MAX_REQUEST_ID} characters")
    if len(start.trace_id) > MAX_REQUEST_ID:
        raise InvalidRequest(f"trace_id has more than {MAX_REQUEST_ID} characters")
    if len(start.traceparent) > MAX_REQUEST_ID:
        raise InvalidRequest(f"traceparent has more than {MAX_REQUEST_ID} characters")
    if start.model not in models:
        raise ModelNotFound(f"this worker serves {', '.join(models)}, not {start.model!r}")
    _check_prompt(start, vocab_size)
    looks_at_prompt = start.HasField("prompt_logprobs") or start.HasField("embed")
    _check_stop(start.stop, prompt_only=looks_at_prompt)
    if len(start.cache_salt) > MAX_CACHE_SALT:
        raise InvalidRequest(f"cache_salt has more than {MAX_CACHE_SALT} characters")
    stop_ids = frozenset(start.stop.stop_token_ids)
    endings = stop_ids | eos_token_ids
    stop_token_ids = stop_ids if start.stop.ignore_eos else endings
    output = resumed_output(start, vocab_size=vocab_size, stop_token_ids=stop_token_ids)
    return Sequence(
        request_id=request_id,
        prompt=list(start.prompt_token_ids),
        sampling=_sampling(start, vocab_size, endings),
        max_tokens=max(1, start.stop.max_tokens),
        prompt_logprobs=start.prompt_logprobs if start.HasField("prompt_logprobs") else -1,
        pooling=_pooling(start, hidden_size) if start.HasField("embed") else None,
        stop_token_ids=stop_token_ids,
        prompt_only=start.stop.max_tokens == 0,
        priority=start.priority,
        cache_salt=start.cache_salt,
        adapter=models.index(start.model),
        output=output,
        resumed=len(output),
    )


def _pooling(start: pb.StartGeneration, hidden_size: int) -> Pooling:
    given = start.embed
    if given.pooling not in (pb.POOLING_MEAN, pb.POOLING_LAST):
        raise InvalidRequest(f"embed: pooling = {given.pooling} is not known")
    if given.dimensions > hidden_size:
        raise InvalidRequest(f"dimensions: the model's embeddings have {hidden_size}")
    return Pooling(
        tokens=len(start.prompt_token_ids),
        last_only=given.pooling == pb.POOLING_LAST,
        dimensions=given.dimensions or hidden_size,
        raw=given.raw,
    )


def _check_prompt(start: pb.StartGeneration, vocab_size: int) -> None:
    if not start.prompt_token_ids:
        raise InvalidRequest("prompt_token_ids is empty")
    if (largest := max(start.prompt_token_ids)) >= vocab_size:
        raise InvalidRequest(f"token id {largest} is outside of the vocabulary of {vocab_size}")


def _check_stop(stop: pb.StopConditions, *, prompt_only: bool) -> None:
    if stop.max_tokens < 1 and not prompt_only:
        raise InvalidRequest("max_tokens must be at least 1")
    if len(stop.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings")
    if not all(stop.stop_strings):
        raise InvalidRequest("a stop string is empty")
    if stop.min_tokens > stop.max_tokens:
        raise InvalidRequest(
            f"min_tokens = {stop.min_tokens} is above max_tokens = {stop.max_tokens}"
        )


def _sampling(start: pb.StartGeneration, vocab_size: int, endings: frozenset[int]) -> SamplingSpec:
    """``endings``: tokens that are not drawn before ``min_tokens``."""
    given = start.sampling
    top_p = given.top_p if given.HasField("top_p") else 1.0
    repetition = given.repetition_penalty if given.HasField("repetition_penalty") else 1.0
    check_range("temperature", given.temperature, 0.0, MAX_TEMPERATURE)
    check_range("top_p", top_p, 0.0, 1.0)
    check_range("min_p", given.min_p, 0.0, 1.0)
    check_range("repetition_penalty", repetition, 1 / MAX_REPETITION, MAX_REPETITION)
    check_range("presence_penalty", given.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    check_range("frequency_penalty", given.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(start, name) > MAX_LOGPROBS:
            raise InvalidRequest(f"{name} = {getattr(start, name)}: at most {MAX_LOGPROBS}")
    early = endings if start.stop.min_tokens else frozenset[int]()
    bias_token_ids, bias_values = token_biases(given, vocab_size, early)
    return SamplingSpec(
        temperature=given.temperature,
        top_p=top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        seed=given.seed if given.HasField("seed") else secrets.randbits(64),
        logprobs=start.logprobs if start.HasField("logprobs") else -1,
        repetition_penalty=repetition,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        bias_token_ids=bias_token_ids,
        bias_values=bias_values,
        min_tokens=start.stop.min_tokens,
        ending_token_ids=_endings(endings, vocab_size) if start.stop.min_tokens else b"",
        banned_sequences=banned_sequences(given, vocab_size),
    )


def _endings(token_ids: frozenset[int], vocab_size: int) -> bytes:
    """int32 ids, which rise. Stop tokens may be any number; no other one is ever drawn."""
    known = sorted(token for token in token_ids if token < vocab_size)
    return np.array(known, dtype=np.int32).tobytes()
