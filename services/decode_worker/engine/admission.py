"""Checks a StartGeneration and makes the sequence that the scheduler runs."""

import math
import secrets
from typing import Final

from precast.errors import InvalidRequest, ModelNotFound
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.engine.sequence import SamplingSpec, Sequence

MAX_REQUEST_ID: Final = 128
MAX_STOP_STRINGS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_PENALTY: Final = 2.0
MAX_TEMPERATURE: Final = 100.0
MAX_BIAS: Final = 100.0


def make_sequence(
    request_id: str,
    start: pb.StartGeneration,
    *,
    model: str,
    vocab_size: int,
    eos_token_ids: frozenset[int],
) -> Sequence:
    """Raises InvalidRequest or ModelNotFound, naming the field."""
    if not 0 < len(request_id) <= MAX_REQUEST_ID:
        raise InvalidRequest(f"request_id must have 1 to {MAX_REQUEST_ID} characters")
    if start.model != model:
        raise ModelNotFound(f"this worker serves {model}, not {start.model!r}")
    _check_prompt(start, vocab_size)
    _check_stop(start.stop)
    stop_ids = frozenset(start.stop.stop_token_ids)
    return Sequence(
        request_id=request_id,
        prompt=list(start.prompt_token_ids),
        sampling=_sampling(start, vocab_size),
        max_tokens=start.stop.max_tokens,
        stop_token_ids=stop_ids if start.stop.ignore_eos else stop_ids | eos_token_ids,
    )


def _check_prompt(start: pb.StartGeneration, vocab_size: int) -> None:
    if not start.prompt_token_ids:
        raise InvalidRequest("prompt_token_ids is empty")
    if (largest := max(start.prompt_token_ids)) >= vocab_size:
        raise InvalidRequest(f"token id {largest} is outside of the vocabulary of {vocab_size}")


def _check_stop(stop: pb.StopConditions) -> None:
    if stop.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1")
    if len(stop.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings")
    if not all(stop.stop_strings):
        raise InvalidRequest("a stop string is empty")


def _sampling(start: pb.StartGeneration, vocab_size: int) -> SamplingSpec:
    given = start.sampling
    _check_range("temperature", given.temperature, 0.0, MAX_TEMPERATURE)
    _check_range("top_p", given.top_p, 0.0, 1.0)
    _check_range("presence_penalty", given.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("frequency_penalty", given.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    for token, bias in given.logit_bias.items():
        _check_range(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        if token >= vocab_size:
            raise InvalidRequest(f"logit_bias: token id {token} is outside of the vocabulary")
    if start.HasField("logprobs") and start.logprobs > MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs = {start.logprobs}: at most {MAX_LOGPROBS}")
    return SamplingSpec(
        temperature=given.temperature,
        top_p=given.top_p or 1.0,
        top_k=given.top_k,
        seed=given.seed if given.HasField("seed") else secrets.randbits(64),
        logprobs=start.logprobs if start.HasField("logprobs") else -1,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=dict(given.logit_bias),
    )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} = {value:g} is not in {low:g} to {high:g}")
