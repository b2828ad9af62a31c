"""``/v1/responses``: its events and its whole answer."""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai import responses as api
from services.gateway.openai.errors import ApiError
from services.gateway.openai.events import TextEvents
from services.gateway.openai.formats import Choice, finish_reason
from services.gateway.openai.interpret import AnswerReader
from services.gateway.openai.plan import Plan
from services.gateway.openai.responses_api.conversation import Origin
from services.gateway.openai.responses_api.fields import ResponsesRequest
from services.gateway.openai.responses_api.items import Items
from services.gateway.routing.event_queue import Delta

_Json = dict[str, Any]


class ResponsesFormat:
    """The answer to one request, which has one choice."""

    text_events: Final[tuple[TextEvents, ...]] = ()

    def __init__(self, plan: Plan) -> None:
        assert isinstance(plan.origin, Origin), "it is planned from one"
        self._plan = plan
        self._origin = plan.origin
        self._body = plan.origin.body
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._reader = AnswerReader(plan.reading)
        self._items = Items(short_call_ids=plan.short_call_ids)
        self._sequence = 0
        self._is_cut = False

    def opening(self, index: int) -> bytes:
        begun = self._response("in_progress", None)
        kinds = ("response.created", "response.in_progress")
        return self._events({"type": kind, "response": begun} for kind in kinds)

    def delta(self, index: int, delta: Delta) -> bytes:
        return self._events(self._told(delta.text))

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        return self._events(self._finish(finished))

    def ending(self, usage: api.Usage) -> bytes:
        status = self._status()
        return self._events([{"type": f"response.{status}", "response": self._end(usage)}])

    def failure(self, error: ApiError) -> bytes:
        detail = error.body()["error"]
        told = {name: detail[name] for name in ("code", "message", "param")}
        return self._events([{"type": "error", **told, "error": detail}])

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> _Json:
        [choice] = choices
        assert choice.finished is not None, "shown before it finished"
        for _ in (*self._told("".join(choice.text)), *self._finish(choice.finished)):
            pass
        return self._end(usage)

    def _end(self, usage: api.Usage) -> _Json:
        response = self._response(self._status(), usage)
        if self._origin.keeps:
            self._origin.response = response
        return response

    def _told(self, text: str) -> list[_Json]:
        return [event for part in self._reader.feed(text) for event in self._items.add(part)]

    def _finish(self, finished: pb.GenerationFinished) -> list[_Json]:
        events = [event for part in self._reader.end() for event in self._items.add(part)]
        self._is_cut = finish_reason(finished) == "length"
        return [*events, *self._items.close(self._status())]

    def _status(self) -> str:
        return "incomplete" if self._is_cut else "completed"

    def _events(self, events: Iterable[_Json]) -> bytes:
        return b"".join(map(self._event, events))

    def _event(self, event: _Json) -> bytes:
        numbered = {**event, "sequence_number": self._sequence}
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(numbered))

    def _response(self, status: str, usage: api.Usage | None) -> _Json:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(self._items.done),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "store": self._origin.keeps,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": _choice(body),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.user,
        }


def _format(body: ResponsesRequest) -> _Json:
    asked = None if body.text is None else body.text.format
    return {"type": "text"} if asked is None else asked.model_dump(by_alias=True)


def _choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    return choice or "auto" if choice is None or isinstance(choice, str) else choice.model_dump()


def _usage(usage: api.Usage) -> _Json:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    cached = prompt.cached_tokens if prompt else 0
    reasoning = completion.reasoning_tokens if completion else 0
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage.total_tokens,
    }
