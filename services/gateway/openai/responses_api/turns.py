"""Turns of the assistant, which come in several items: reasoning, a text, calls."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from services.gateway.openai.responses_api.fields import InputCall, InputMessage, InputReasoning

_Json = dict[str, Any]
Part = InputReasoning | InputMessage | InputCall


@dataclass(kw_only=True)
class AssistantTurn:
    """One message of the chat, item by item: templates want a turn whole, and with its reasoning
    where its calls have led to something."""

    text: str | None = None
    _thoughts: list[str] = field(default_factory=list, init=False)
    _calls: list[_Json] = field(default_factory=list, init=False)

    def takes(self, item: Part) -> bool:
        """Whether the item is of this turn. Behind a text come calls, and nothing but calls behind
        these."""
        return isinstance(item, InputCall) or (self.text is None and not self._calls)

    def call(self, item: InputCall) -> None:
        function = {"name": item.name, "arguments": item.arguments}
        self._calls.append({"id": item.call_id, "type": "function", "function": function})

    def think(self, item: InputReasoning) -> None:
        self._thoughts += [part.text for part in item.content or ()]

    def message(self) -> Iterator[_Json]:
        """Nothing where the assistant has only thought."""
        if self.text is None and not self._calls:
            return
        message: _Json = {"role": "assistant", "content": self.text}
        if self._calls:
            message["tool_calls"] = self._calls
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts)
        yield message
