"""Generations as OpenAI's JSON: events of a stream, or one whole answer.

A format belongs to one request. ``Choice`` is what has come of one choice so far. Each endpoint's
format has a module of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import UNSET, Struct, UnsetType, structs

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai import responses as api
from services.gateway.openai.errors import ApiError
from services.gateway.openai.events import TextEvents
from services.gateway.openai.plan import Plan
from services.gateway.routing.event_queue import Delta


@dataclass(kw_only=True)
class Choice:
    """A choice of a whole answer."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finished: pb.GenerationFinished | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        self.logprobs.extend(delta.logprobs)


class Format(Protocol):
    """How one endpoint shows a generation."""

    @property
    def text_events(self) -> Sequence[TextEvents]:
        """For each choice, of a stream whose deltas are shown as text and nothing else; none of
        others."""

    def opening(self, index: int) -> bytes:
        """The event before the first delta of a choice, if there is one."""

    def delta(self, index: int, delta: Delta) -> bytes:
        """The event of a delta; empty if it has nothing to show."""

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        """The event with the finish reason."""

    def ending(self, usage: api.Usage) -> bytes:
        """The last events, once all choices have finished; ``usage``: of the whole request."""

    def failure(self, error: ApiError) -> bytes:
        """The event of an error that ends the stream."""

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> Struct | dict[str, Any]:
        """The answer to a request that doesn't stream."""


def usage_of(
    plan: Plan,
    completion_tokens: int,
    details: api.PromptTokensDetails | UnsetType = UNSET,
) -> api.Usage:
    """Prompts count once, however many choices they have."""
    return api.Usage(
        prompt_tokens=plan.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=plan.prompt_tokens + completion_tokens,
        prompt_tokens_details=details,
    )


def total_usage(
    plan: Plan, ends: Sequence[pb.GenerationFinished], reasoning_tokens: int | None = None
) -> api.Usage:
    """``ends``: of all choices. The first of a prompt's choices to be computed is what the others
    find in the cache; what it found itself counts."""
    each = plan.choices_per_prompt
    groups = (ends[start : start + each] for start in range(0, len(ends), each))
    cached = sum(min(end.cached_tokens for end in group) for group in groups)
    completion_tokens = sum(end.completion_tokens for end in ends)
    usage = usage_of(plan, completion_tokens, api.PromptTokensDetails(cached_tokens=cached))
    if reasoning_tokens is None:
        return usage
    details = api.CompletionTokensDetails(reasoning_tokens=reasoning_tokens)
    return structs.replace(usage, completion_tokens_details=details)


class ChunkUsage:
    """What the chunks of a stream show as usage: nothing, null, or the tokens up to here."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tokens = [0] * len(plan.starts)

    @property
    def changes(self) -> bool:
        """Whether it is another one in each chunk."""
        return self._plan.continuous_usage

    def add(self, index: int, tokens: int) -> None:
        self._tokens[index] += tokens

    def set(self, index: int, tokens: int) -> None:
        """The choice has finished with so many."""
        self._tokens[index] = tokens

    def shown(self) -> api.Usage | UnsetType | None:
        if self._plan.continuous_usage:
            return usage_of(self._plan, sum(self._tokens))
        return None if self._plan.include_usage else UNSET


def finish_reason(finished: pb.GenerationFinished | None, *, has_calls: bool = False) -> str:
    """``has_calls``: the answer calls tools."""
    assert finished is not None, "shown before it finished"
    if finished.reason == pb.FINISH_REASON_LENGTH:
        return "length"
    return "tool_calls" if has_calls else "stop"


def stop_reason(finished: pb.GenerationFinished | None) -> str | UnsetType:
    """The stop string that ended the choice."""
    assert finished is not None, "shown before it finished"
    return finished.stop_string or UNSET
