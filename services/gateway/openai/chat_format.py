"""``/v1/chat/completions``: its events and its whole answer."""

import time
import uuid
from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai import responses as api
from services.gateway.openai.call_ids import new_call_id
from services.gateway.openai.errors import ApiError
from services.gateway.openai.events import DONE, MARK, TextEvents, error_event, event
from services.gateway.openai.formats import Choice, ChunkUsage, finish_reason, stop_reason
from services.gateway.openai.interpret import AnswerReader
from services.gateway.openai.logprobs import chat_logprobs, prompt_logprobs_by_id
from services.gateway.openai.message import message_of
from services.gateway.openai.parts import CallBegun, Content, Part, Reasoning
from services.gateway.openai.plan import Plan
from services.gateway.routing.event_queue import Delta


class ChatFormat:
    """The answer to one request."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._usage = ChunkUsage(plan)
        self._readers = [AnswerReader(plan.reading) for _ in plan.starts]
        self._is_plain = plan.reading.is_plain and not (
            self._usage.changes or plan.shows_logprobs or plan.shows_token_ids
        )
        mark = api.ChatDelta(content=MARK)
        choices = (api.ChatChunkChoice(index=i, delta=mark) for i in range(len(plan.starts)))
        self._texts = [TextEvents(self._chunk(choice)) for choice in choices] if plan.stream else []

    @property
    def text_events(self) -> Sequence[TextEvents]:
        return self._texts if self._is_plain else ()

    def opening(self, index: int) -> bytes:
        delta = api.ChatDelta(role="assistant", content="")
        chosen = api.ChatChunkChoice(index=index, delta=delta)
        return event(self._answer([chosen], self._usage.shown(), self._prompt_ids(index)))

    def delta(self, index: int, delta: Delta) -> bytes:
        self._usage.add(index, delta.tokens)
        if self._is_plain:
            return self._texts[index].event(delta.text) if delta.text else b""
        parts = self._readers[index].feed(delta.text)
        deltas = [_delta(part, self._plan) for part in parts]
        logprobs = chat_logprobs(delta.logprobs)
        ids = delta.token_ids if self._plan.shows_token_ids and delta.token_ids else UNSET
        if not deltas and logprobs is None and ids is UNSET:
            return b""
        first = deltas[0] if deltas else api.ChatDelta()
        head = api.ChatChunkChoice(index=index, delta=first, logprobs=logprobs, token_ids=ids)
        return event(self._chunk(head)) + self._events(index, deltas[1:])

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        self._usage.set(index, finished.completion_tokens)
        reader = self._readers[index]
        rest = self._events(index, [_delta(part, self._plan) for part in reader.end()])
        reason = finish_reason(finished, has_calls=reader.has_calls)
        choice = api.ChatChunkChoice(
            index=index,
            delta=api.ChatDelta(),
            finish_reason=reason,
            stop_reason=stop_reason(finished),
        )
        return rest + event(self._chunk(choice))

    def ending(self, usage: api.Usage) -> bytes:
        totals = event(self._answer([], usage)) if self._plan.include_usage else b""
        return totals + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error.body())

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> Struct:
        return api.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._plan.model,
            system_fingerprint=self._plan.fingerprint,
            choices=[self._whole_choice(index, choice) for index, choice in enumerate(choices)],
            usage=usage,
            prompt_token_ids=self._prompt_ids(0),
            prompt_logprobs=prompt_logprobs_by_id(choices[0].prompt_logprobs)
            if self._plan.shows_prompt_logprobs
            else UNSET,
        )

    def _whole_choice(self, index: int, choice: Choice) -> api.ChatChoice:
        message = message_of("".join(choice.text), self._plan)
        return api.ChatChoice(
            index=index,
            message=message,
            logprobs=chat_logprobs(choice.logprobs),
            finish_reason=finish_reason(choice.finished, has_calls=message.tool_calls is not UNSET),
            stop_reason=stop_reason(choice.finished),
            token_ids=choice.token_ids if self._plan.shows_token_ids else UNSET,
        )

    def _prompt_ids(self, index: int) -> list[int] | UnsetType:
        if not self._plan.shows_token_ids or index:
            return UNSET
        return list(self._plan.starts[0].prompt_token_ids)

    def _events(self, index: int, deltas: Sequence[api.ChatDelta]) -> bytes:
        return b"".join(
            event(self._chunk(api.ChatChunkChoice(index=index, delta=delta))) for delta in deltas
        )

    def _chunk(self, choice: api.ChatChunkChoice) -> Struct:
        return self._answer([choice], self._usage.shown())

    def _answer(
        self,
        choices: list[api.ChatChunkChoice],
        usage: api.Usage | UnsetType | None,
        prompt_ids: list[int] | UnsetType = UNSET,
    ) -> Struct:
        return api.ChatChunk(
            id=self._id,
            created=self._created,
            model=self._plan.model,
            system_fingerprint=self._plan.fingerprint,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_ids,
        )


def _delta(part: Part, plan: Plan) -> api.ChatDelta:
    if isinstance(part, Content):
        return api.ChatDelta(content=part.text)
    if isinstance(part, Reasoning):
        return api.ChatDelta(reasoning_content=part.text)
    if isinstance(part, CallBegun):
        function = api.FunctionDelta(name=part.name, arguments="")
        call = api.ToolCallDelta(
            index=part.index,
            id=new_call_id(short=plan.short_call_ids),
            type="function",
            function=function,
        )
        return api.ChatDelta(tool_calls=[call])
    function = api.FunctionDelta(arguments=part.text)
    return api.ChatDelta(tool_calls=[api.ToolCallDelta(index=part.index, function=function)])
