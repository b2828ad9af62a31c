"""Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": ...}]``; newer models write
``[TOOL_CALLS]name[ARGS]{...}`` for each call."""

from typing import Final

from services.gateway.openai.tools.call_body import ObjectCall
from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.json_text import BLANKS, ValueSpan
from services.gateway.openai.tools.reader import Syntax

_ARGS: Final = "[ARGS]"
_CALL_ID: Final = "[CALL_ID]"
_MAX_NAME: Final = 256


class MistralCall:
    """A call in either of the two forms."""

    def __init__(self) -> None:
        self._object: ObjectCall | None = None
        self._head = ""
        """The name, and what follows it up to the arguments."""
        self._span: ValueSpan | None = None
        self.name = ""
        self.begun = self.done = self.wrong = False

    def feed(self, letter: str) -> str:
        if not self._head and letter == "{" and self._object is None:
            self._object = ObjectCall()
        if self._object is not None:
            return self._delegate(self._object, letter)
        return self._feed_head(letter) if self._span is None else self._feed_arguments(letter)

    def _delegate(self, call: ObjectCall, letter: str) -> str:
        told = call.feed(letter)
        self.name, self.begun, self.done, self.wrong = call.name, call.begun, call.done, call.wrong
        return told

    def _feed_head(self, letter: str) -> str:
        if letter != "{":
            self._head += letter
            self.wrong = len(self._head) > _MAX_NAME or letter in BLANKS
            return ""
        head = self._head.removesuffix(_ARGS).partition(_CALL_ID)[0]
        self.name = head
        self.begun, self.wrong = bool(head), not head
        self._span = ValueSpan()
        return self._feed_arguments(letter)

    def _feed_arguments(self, letter: str) -> str:
        assert self._span is not None
        self.done = self._span.feed(letter) == "last"
        return letter


FORMAT: Final = ToolFormat(
    name="mistral",
    syntax=Syntax(begins=("[TOOL_CALLS]",), body=MistralCall),
    seen_in=("[TOOL_CALLS]",),
    head='[{{"name": {name}, "arguments": ',
    tail="}]",
    short_ids=True,
)
