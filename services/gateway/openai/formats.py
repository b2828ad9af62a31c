"""Generations as OpenAI's JSON: events of a stream, or one whole answer.

A format belongs to one request. ``Choice`` is what has come of one choice so far.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import UNSET, Struct, UnsetType

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai import responses as api
from services.gateway.openai.events import MARK, TextEvents, event
from services.gateway.openai.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from services.gateway.openai.prepare import Plan
from services.gateway.routing.event_queue import Delta


@dataclass(kw_only=True)
class Choice:
    """A choice of a whole answer."""

    text: list[str] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finished: pb.GenerationFinished | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)


class Format(Protocol):
    """How one endpoint shows a generation."""

    def opening(self, index: int) -> bytes:
        """The event before the first delta of a choice, if there is one."""

    def delta(self, index: int, delta: Delta) -> bytes:
        """The event of a delta; empty if it has nothing to show."""

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        """The event with the finish reason."""

    def totals(self, usage: api.Usage) -> bytes:
        """The event with the usage of the whole request."""

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> Struct:
        """The answer to a request that doesn't stream."""


def make_format(plan: Plan) -> Format:
    return CompletionFormat(plan) if plan.endpoint == "completions" else ChatFormat(plan)


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


def total_usage(plan: Plan, ends: Sequence[pb.GenerationFinished]) -> api.Usage:
    """``ends``: of all choices. The first of a prompt's choices to be computed is what the others
    find in the cache; what it found itself counts."""
    each = plan.choices_per_prompt
    groups = (ends[start : start + each] for start in range(0, len(ends), each))
    cached = sum(min(end.cached_tokens for end in group) for group in groups)
    completion_tokens = sum(end.completion_tokens for end in ends)
    return usage_of(plan, completion_tokens, api.PromptTokensDetails(cached_tokens=cached))


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


def finish_reason(finished: pb.GenerationFinished | None) -> str:
    assert finished is not None, "shown before it finished"
    return "length" if finished.reason == pb.FINISH_REASON_LENGTH else "stop"


class CompletionFormat:
    """``/v1/completions``."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._offsets = [TextOffsets(len(echo)) for echo in plan.echoes]
        self._usage = ChunkUsage(plan)
        choices = (api.CompletionChoice(index=i, text=MARK) for i in range(len(plan.starts)))
        self._texts = [TextEvents(self._chunk(choice)) for choice in choices] if plan.stream else []

    def opening(self, index: int) -> bytes:
        echo = self._plan.echoes[index]
        return event(self._chunk(api.CompletionChoice(index=index, text=echo))) if echo else b""

    def delta(self, index: int, delta: Delta) -> bytes:
        self._usage.add(index, delta.tokens)
        if not delta.text and not delta.logprobs:
            return b""
        if not delta.logprobs and not self._usage.changes:
            return self._texts[index].event(delta.text)
        logprobs = completion_logprobs(delta.logprobs, self._offsets[index])
        choice = api.CompletionChoice(index=index, text=delta.text, logprobs=logprobs)
        return event(self._chunk(choice))

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        self._usage.set(index, finished.completion_tokens)
        reason = finish_reason(finished)
        choice = api.CompletionChoice(index=index, text="", finish_reason=reason)
        return event(self._chunk(choice))

    def totals(self, usage: api.Usage) -> bytes:
        return event(self._answer([], usage))

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> Struct:
        shown = [
            api.CompletionChoice(
                index=index,
                text=self._plan.echoes[index] + "".join(choice.text),
                logprobs=completion_logprobs(choice.logprobs, self._offsets[index]),
                finish_reason=finish_reason(choice.finished),
            )
            for index, choice in enumerate(choices)
        ]
        return self._answer(shown, usage)

    def _chunk(self, choice: api.CompletionChoice) -> Struct:
        return self._answer([choice], self._usage.shown())

    def _answer(
        self, choices: list[api.CompletionChoice], usage: api.Usage | UnsetType | None
    ) -> Struct:
        return api.Completion(
            id=self._id,
            created=self._created,
            model=self._plan.model,
            choices=choices,
            usage=usage,
        )


class ChatFormat:
    """``/v1/chat/completions``."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._usage = ChunkUsage(plan)
        mark = api.ChatDelta(content=MARK)
        choices = (api.ChatChunkChoice(index=i, delta=mark) for i in range(len(plan.starts)))
        self._texts = [TextEvents(self._chunk(choice)) for choice in choices] if plan.stream else []

    def opening(self, index: int) -> bytes:
        delta = api.ChatDelta(role="assistant", content="")
        return event(self._chunk(api.ChatChunkChoice(index=index, delta=delta)))

    def delta(self, index: int, delta: Delta) -> bytes:
        self._usage.add(index, delta.tokens)
        if not delta.text and not delta.logprobs:
            return b""
        if not delta.logprobs and not self._usage.changes:
            return self._texts[index].event(delta.text)
        shown = api.ChatDelta(content=delta.text)
        logprobs = chat_logprobs(delta.logprobs)
        return event(self._chunk(api.ChatChunkChoice(index=index, delta=shown, logprobs=logprobs)))

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        self._usage.set(index, finished.completion_tokens)
        reason = finish_reason(finished)
        choice = api.ChatChunkChoice(index=index, delta=api.ChatDelta(), finish_reason=reason)
        return event(self._chunk(choice))

    def totals(self, usage: api.Usage) -> bytes:
        return event(self._answer([], usage))

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> Struct:
        shown = [
            api.ChatChoice(
                index=index,
                message=api.ChatMessage(content="".join(choice.text)),
                logprobs=chat_logprobs(choice.logprobs),
                finish_reason=finish_reason(choice.finished),
            )
            for index, choice in enumerate(choices)
        ]
        return api.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._plan.model,
            choices=shown,
            usage=usage,
        )

    def _chunk(self, choice: api.ChatChunkChoice) -> Struct:
        return self._answer([choice], self._usage.shown())

    def _answer(
        self, choices: list[api.ChatChunkChoice], usage: api.Usage | UnsetType | None
    ) -> Struct:
        return api.ChatChunk(
            id=self._id,
            created=self._created,
            model=self._plan.model,
            choices=choices,
            usage=usage,
        )
