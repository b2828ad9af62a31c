"""The items of a response, and the events that tell of them as they come."""

import uuid
from collections.abc import Iterator
from typing import Any, Final

from services.gateway.openai.call_ids import new_call_id
from services.gateway.openai.parts import CallArguments, CallBegun, Content, Part, Reasoning

_Json = dict[str, Any]
_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class Items:
    """What one response consists of so far. Its methods return the events of what has changed."""

    def __init__(self, *, short_call_ids: bool) -> None:
        self._short = short_call_ids
        self._open: _Json | None = None
        self._text: list[str] = []
        self.done: list[_Json] = []

    def add(self, part: Part) -> Iterator[_Json]:
        match part:
            case Content():
                yield from self._within("message")
                yield self._delta("response.output_text.delta", part.text, logprobs=[])
            case Reasoning():
                yield from self._within("reasoning")
                yield self._delta("response.reasoning_text.delta", part.text)
            case CallBegun():
                yield from self.close()
                yield from self._begin("function_call", name=part.name)
            case CallArguments():
                yield self._delta("response.function_call_arguments.delta", part.text)

    def close(self, status: str = "completed") -> Iterator[_Json]:
        """The present item is complete."""
        if self._open is None:
            return
        item, text = self._open, "".join(self._text)
        item["status"] = status
        place = {"item_id": item["id"], "output_index": len(self.done)}
        match item["type"]:
            case "message":
                item["content"] = [_output_text(text)]
                place |= {"content_index": 0}
                yield {"type": "response.output_text.done", **place, "text": text, "logprobs": []}
                yield {"type": "response.content_part.done", **place, "part": _output_text(text)}
            case "reasoning":
                item["content"] = [{"type": "reasoning_text", "text": text}]
                place |= {"content_index": 0}
                yield {"type": "response.reasoning_text.done", **place, "text": text}
            case _:
                item["arguments"] = text
                done = {"name": item["name"], "arguments": text}
                yield {"type": "response.function_call_arguments.done", **place, **done}
        yield {
            "type": "response.output_item.done",
            "output_index": len(self.done),
            "item": dict(item),
        }
        self.done.append(item)
        self._open = None

    def _within(self, kind: str) -> Iterator[_Json]:
        """An item of this kind is open."""
        if self._open is not None and self._open["type"] == kind:
            return
        yield from self.close()
        yield from self._begin(kind)

    def _begin(self, kind: str, **fields: Any) -> Iterator[_Json]:
        item: _Json = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind}
        item |= {"status": "in_progress", **fields}
        match kind:
            case "message":
                item |= {"role": "assistant", "content": []}
            case "reasoning":
                item |= {"summary": [], "content": []}
            case _:
                item |= {"call_id": new_call_id(short=self._short), "arguments": ""}
        self._open, self._text = item, []
        index = len(self.done)
        yield {"type": "response.output_item.added", "output_index": index, "item": dict(item)}
        if kind == "message":
            place = {"item_id": item["id"], "output_index": index, "content_index": 0}
            yield {"type": "response.content_part.added", **place, "part": _output_text("")}

    def _delta(self, kind: str, text: str, **fields: Any) -> _Json:
        assert self._open is not None, "it was begun"
        self._text.append(text)
        place: _Json = {"item_id": self._open["id"], "output_index": len(self.done)}
        if self._open["type"] != "function_call":
            place["content_index"] = 0
        return {"type": kind, **place, "delta": text, **fields}


def _output_text(text: str) -> _Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
