"""What workers are sent for one choice: sampling, stop conditions and all that goes with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.tokenizer.model_tokenizer import ModelTokenizer
from services.gateway.openai.bad_words import NOTHING_BANNED, Banned
from services.gateway.openai.errors import context_length_exceeded, invalid
from services.gateway.openai.generation_fields import GenerationFields

_MAX_STOP_TEXT: Final = 8 << 20
"""Characters of all choices' stop strings."""
_SEED_MASK: Final = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the choices of a request have in common, beside their body's fields."""

    stops: Sequence[str]
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: pb.OutputConstraint | None = None
    banned: Banned = NOTHING_BANNED
    show_special_tokens: bool = False


def start_of(
    body: GenerationFields, ids: list[int], max_tokens: int, wanted: Wanted, choice: int
) -> pb.StartGeneration:
    """What the worker is sent for the ``choice``-th completion of one prompt."""
    return pb.StartGeneration(
        model=body.model,
        prompt_token_ids=ids,
        sampling=_sampling(body, wanted, choice),
        stop=_stop(body, max_tokens, wanted),
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        deliver_at_end=not body.stream,
        cache_salt=body.cache_salt or "",
        constraint=wanted.constraint,
        priority=-(body.priority or 0),  # for vLLM's clients, lower goes first
    )


def _stop(body: GenerationFields, max_tokens: int, wanted: Wanted) -> pb.StopConditions:
    return pb.StopConditions(
        max_tokens=max_tokens,
        stop_strings=wanted.stops,
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=_least_tokens(body, max_tokens),
        include_stop_string=bool(body.include_stop_str_in_output),
        show_special_tokens=wanted.show_special_tokens,
    )


def _least_tokens(body: GenerationFields, max_tokens: int) -> int:
    least = body.min_tokens or 0
    if least > max_tokens:
        reason = f"{least} is more than the {max_tokens} tokens that the answer may have"
        raise invalid(f"Invalid 'min_tokens': {reason}.", "min_tokens")
    return least


def _sampling(body: GenerationFields, wanted: Wanted, choice: int) -> pb.SamplingParams:
    repetition = body.repetition_penalty
    # One seed for all choices would make them equal.
    seed = None if body.seed is None else (body.seed + choice) & _SEED_MASK
    return pb.SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repeat_penalty if repetition is None else repetition,
        logit_bias=body.logit_bias,
        allowed_token_ids=body.allowed_token_ids or (),
        banned_token_ids=wanted.banned.tokens,
        banned_sequences=[pb.TokenSequence(token_ids=ids) for ids in wanted.banned.sequences],
    )


def stops_of(
    body: GenerationFields, tokenizer: ModelTokenizer, limit: int, choices: int
) -> list[str]:
    """Stop strings that can occur: others are longer than the text of a whole context.

    Raises ``ApiError`` 400 if the choices, each of which carries them, make too much of them.
    """
    stops = [stop for stop in body.stop if len(stop) <= limit * tokenizer.longest_token]
    if choices * sum(map(len, stops)) > _MAX_STOP_TEXT:
        raise invalid(f"Invalid 'stop': too much text for {choices} choices.", "stop")
    return stops


def what_is_left(wanted: int, prompt: int, limit: int, field: str) -> int:
    """Tokens to generate where none were asked for. Raises ``ApiError`` 400 if there is no room."""
    if prompt >= limit:
        raise context_length_exceeded(limit, prompt, 1, field)
    return min(wanted, limit - prompt)


def fitting(asked: int, prompt: int, limit: int, field: str) -> int:
    """Tokens to generate, as many as were asked for. Raises ``ApiError`` 400 if they don't fit."""
    if prompt + asked > limit:
        raise context_length_exceeded(limit, prompt, asked, field)
    return asked
