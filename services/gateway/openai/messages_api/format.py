"""``/v1/messages``: its events and its whole answer."""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai import responses as api
from services.gateway.openai.call_ids import new_call_id
from services.gateway.openai.errors import ApiError
from services.gateway.openai.events import TextEvents
from services.gateway.openai.formats import Choice, finish_reason
from services.gateway.openai.interpret import AnswerReader
from services.gateway.openai.parts import CallArguments, CallBegun, Content, Part, Reasoning
from services.gateway.openai.plan import Plan
from services.gateway.routing.event_queue import Delta

_Json = dict[str, Any]
_REASONS: Final = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessagesFormat:
    """The answer to one request, which has one choice."""

    text_events: Final[tuple[TextEvents, ...]] = ()

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._id = f"msg_{uuid.uuid4().hex}"
        self._reader = AnswerReader(plan.reading)
        self._blocks: list[_Json] = []
        self._text: list[str] = []
        """Of the last block, which is open."""
        self._reason: str | None = None
        self._stop: str | None = None
        """The stop sequence that ended it."""

    def opening(self, index: int) -> bytes:
        usage = {"input_tokens": self._plan.prompt_tokens, "output_tokens": 0}
        return _event({"type": "message_start", "message": self._message([], usage)})

    def delta(self, index: int, delta: Delta) -> bytes:
        parts = self._reader.feed(delta.text)
        return b"".join(_event(event) for part in parts for event in self._told(part))

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        return b"".join(map(_event, self._finish(finished)))

    def ending(self, usage: api.Usage) -> bytes:
        told = {"stop_reason": self._reason, "stop_sequence": self._stop}
        last = {"type": "message_delta", "delta": told, "usage": _usage(usage)}
        return _event(last) + _event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        return _event(error.anthropic_body())

    def whole(self, choices: Sequence[Choice], usage: api.Usage) -> _Json:
        [choice] = choices
        assert choice.finished is not None, "shown before it finished"
        for part in self._reader.feed("".join(choice.text)):
            for _ in self._told(part):
                pass
        for _ in self._finish(choice.finished):
            pass
        return self._message(self._blocks, _usage(usage))

    def _finish(self, finished: pb.GenerationFinished) -> list[_Json]:
        events = [event for part in self._reader.end() for event in self._told(part)]
        self._reason = _REASONS[finish_reason(finished, has_calls=self._reader.has_calls)]
        if self._reason == "end_turn" and finished.stop_string:
            self._reason, self._stop = "stop_sequence", finished.stop_string
        return [*events, *self._close()]

    def _told(self, part: Part) -> Iterator[_Json]:
        match part:
            case Content():
                yield from self._within({"type": "text", "text": ""})
                yield self._delta("text_delta", "text", part.text)
            case Reasoning():
                yield from self._within({"type": "thinking", "thinking": "", "signature": ""})
                yield self._delta("thinking_delta", "thinking", part.text)
            case CallBegun():
                yield from self._close()
                call_id = new_call_id(short=self._plan.short_call_ids, prefix="toolu")
                yield from self._begin(
                    {"type": "tool_use", "id": call_id, "name": part.name, "input": {}}
                )
            case CallArguments():
                yield self._delta("input_json_delta", "partial_json", part.text)

    def _within(self, block: _Json) -> Iterator[_Json]:
        if self._text and self._blocks[-1]["type"] == block["type"]:
            return
        yield from self._close()
        yield from self._begin(block)

    def _begin(self, block: _Json) -> Iterator[_Json]:
        self._blocks.append(block)
        yield {
            "type": "content_block_start",
            "index": len(self._blocks) - 1,
            "content_block": dict(block),
        }

    def _delta(self, kind: str, name: str, text: str) -> _Json:
        self._text.append(text)
        delta = {"type": kind, name: text}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[_Json]:
        """The last block, if it is open, is complete."""
        if not self._text:
            return
        block, text = self._blocks[-1], "".join(self._text)
        name = "input" if block["type"] == "tool_use" else block["type"]
        block[name] = _object(text) if name == "input" else text
        self._text = []
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _message(self, content: list[_Json], usage: _Json) -> _Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._plan.model,
            "content": content,
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": usage,
        }


def _event(event: _Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))


def _object(text: str) -> Any:
    """Arguments; an answer that was cut may end within them."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _usage(usage: api.Usage) -> _Json:
    prompt = usage.prompt_tokens_details
    cached = prompt.cached_tokens if prompt else 0
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
