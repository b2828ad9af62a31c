"""``/v1/completions``: its events and its whole answer."""

import time
import uuid
from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai import responses as api
from services.gateway.openai.errors import ApiError
from services.gateway.openai.events import DONE, MARK, TextEvents, error_event, event
from services.gateway.openai.formats import Choice, ChunkUsage, finish_reason, stop_reason
from services.gateway.openai.logprobs import (
    TextOffsets,
    completion_logprobs,
    joined,
    prompt_logprobs,
    prompt_logprobs_by_id,
)
from services.gateway.openai.plan import Plan
from services.gateway.routing.event_queue import Delta


class CompletionFormat:
    """The answer to one request."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._offsets = [TextOffsets(len(echo)) for echo in plan.echoes]
        self._usage = ChunkUsage(plan)
        self._is_plain = not (self._usage.changes or plan.shows_logprobs or plan.shows_token_ids)
        choices = (api.CompletionChoice(index=i, text=MARK) for i in range(len(plan.starts)))
        self._texts = [TextEvents(self._chunk(choice)) for choice in choices] if plan.stream else []

    @property
    def text_events(self) -> Sequence[TextEvents]:
        return self._texts if self._is_plain else ()

    def opening(self, index: int) -> bytes:
        plan = self._plan
        echo = "" if plan.echoes_logprobs else plan.echoes[index]
        if not echo and not plan.shows_token_ids:
            return b""
        shown = self._prompt_ids(index)
        return event(
            self._chunk(api.CompletionChoice(index=index, text=echo, prompt_token_ids=shown))
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        self._usage.add(index, delta.tokens)
        prompt = self._prompt(index, delta) if delta.prompt_logprobs else b""
        ids = delta.token_ids if self._plan.shows_token_ids else []
        if not delta.text and not delta.logprobs and not ids:
            return prompt
        if self._is_plain:
            return prompt + self._texts[index].event(delta.text)
        return prompt + event(self._chunk(self._shown(index, delta)))

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        self._usage.set(index, finished.completion_tokens)
        reason = finish_reason(finished)
        choice = api.CompletionChoice(
            index=index, text="", finish_reason=reason, stop_reason=stop_reason(finished)
        )
        return event(self._chunk(choice))

    def ending(self, usage: api.Usage) -> bytes:
        totals = event(self._answer([], usage)) if self._plan.include_usage else b""
        return totals + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error.body())

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> Struct:
        kept = [at for group in self._groups() for at in self._likeliest(group, choices)]
        shown = [self._whole_choice(at, index, choices[at]) for index, at in enumerate(kept)]
        return self._answer(shown, usage)

    def _groups(self) -> list[range]:
        """The choices of each prompt."""
        each = self._plan.choices_per_prompt
        return [range(start, start + each) for start in range(0, len(self._plan.starts), each)]

    def _likeliest(self, group: range, choices: Sequence[Choice]) -> list[int]:
        if self._plan.shown_per_prompt == len(group):
            return list(group)
        ranked = sorted(group, key=lambda at: -_mean_logprob(choices[at]))
        return ranked[: self._plan.shown_per_prompt]

    def _whole_choice(self, at: int, index: int, choice: Choice) -> api.CompletionChoice:
        plan = self._plan
        logprobs = completion_logprobs(choice.logprobs, self._offsets[at])
        if plan.echoes_logprobs:
            logprobs = joined(prompt_logprobs(choice.prompt_logprobs), logprobs)
        return api.CompletionChoice(
            index=index,
            text=plan.echoes[at] + "".join(choice.text),
            logprobs=logprobs if plan.shows_logprobs else None,
            finish_reason=finish_reason(choice.finished),
            stop_reason=stop_reason(choice.finished),
            prompt_token_ids=self._prompt_ids(at),
            token_ids=choice.token_ids if plan.shows_token_ids else UNSET,
            prompt_logprobs=prompt_logprobs_by_id(choice.prompt_logprobs)
            if plan.shows_prompt_logprobs
            else UNSET,
        )

    def _prompt(self, index: int, delta: Delta) -> bytes:
        """The event of a prompt that is echoed with its probabilities."""
        if not self._plan.echoes_logprobs:
            return b""
        shown = prompt_logprobs(delta.prompt_logprobs)
        echo = self._plan.echoes[index]
        return event(self._chunk(api.CompletionChoice(index=index, text=echo, logprobs=shown)))

    def _shown(self, index: int, delta: Delta) -> api.CompletionChoice:
        return api.CompletionChoice(
            index=index,
            text=delta.text,
            logprobs=completion_logprobs(delta.logprobs, self._offsets[index]),
            token_ids=delta.token_ids if self._plan.shows_token_ids else UNSET,
        )

    def _prompt_ids(self, index: int) -> list[int] | UnsetType:
        if not self._plan.shows_token_ids:
            return UNSET
        return list(self._plan.starts[index].prompt_token_ids)

    def _chunk(self, choice: api.CompletionChoice) -> Struct:
        return self._answer([choice], self._usage.shown())

    def _answer(
        self, choices: list[api.CompletionChoice], usage: api.Usage | UnsetType | None
    ) -> Struct:
        return api.Completion(
            id=self._id,
            created=self._created,
            model=self._plan.model,
            system_fingerprint=self._plan.fingerprint,
            choices=choices,
            usage=usage,
        )


def _mean_logprob(choice: Choice) -> float:
    """Of an answer's tokens; an empty answer is the least likely."""
    logprobs = [token.logprob for token in choice.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")
