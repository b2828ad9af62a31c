"""gpt-oss' way to write answers: messages in channels, one of which is the answer.

``<|channel|>analysis<|message|>...<|end|>`` is reasoning; then there is ``<|start|>assistant`` and
``<|channel|>final<|message|>...``, which is content. A message ``to=functions.NAME`` is a call of a
tool. An answer that doesn't begin so is content as a whole.
"""

import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Final

from services.gateway.openai.parts import CallArguments, CallBegun, Content, Part, Reasoning
from services.gateway.openai.tools.fields import Tool
from services.gateway.openai.tools.grammar import json_in_lark

CHANNEL: Final = "<|channel|>"
MESSAGE: Final = "<|message|>"
_START: Final = "<|start|>"
_CONSTRAIN: Final = "<|constrain|>"
_END: Final = "<|end|>"
_LAST: Final = (_END, "<|call|>", "<|return|>")
MARKS: Final = (CHANNEL, MESSAGE, _START, _CONSTRAIN, *_LAST)
_STOPS: Final = (*_LAST, _START, CHANNEL)
"""What ends a message's text."""
_RECIPIENT: Final = "to=functions."
_OPENINGS: Final = (CHANNEL, _START, MESSAGE, _RECIPIENT)
_NAMED: Final = re.compile(re.escape(_RECIPIENT) + r"([^\s<]+)")
_ANALYSIS: Final = re.compile(re.escape(CHANNEL) + r"\s*analysis\b")


def writes_harmony(template: str) -> bool:
    """``template``: a chat template's text."""
    return CHANNEL in template and MESSAGE in template


class HarmonyReader:
    """Reads one answer piece by piece. However it is cut, the parts, joined, are the same."""

    def __init__(self, names: Collection[str] = (), *, most: int | None = None) -> None:
        """``names``: of the tools that may be called, ``most`` times."""
        self._names = names
        self._most = most
        self._state = "start"
        self._waiting = ""
        """Text that may be a header, or the beginning of a mark."""
        self._part: Callable[[str], Part] | None = None
        """Makes parts of the message's text; None: it is left out."""
        self._said: set[type[Part]] = set()
        self._gap = ""
        """Between two messages of a kind."""
        self.calls = 0

    def feed(self, text: str) -> list[Part]:
        self._waiting += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def end(self) -> list[Part]:
        """What is left when the text is over; a header without its message is nothing."""
        rest, self._waiting = self._waiting, ""
        parts: list[Part] = []
        if self._state == "header":
            if _START.startswith(rest[: len(_START)]) or any(mark in rest for mark in _OPENINGS):
                return []
            self._part = _content
        self._add(rest, parts)
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """One step; whether there may be another."""
        match self._state:
            case "start":
                return self._at_start()
            case "header":
                header, mark, rest = self._waiting.partition(MESSAGE)
                if mark:
                    self._waiting, self._state = rest, "body"
                    self._begin(header, parts)
                return bool(mark)
            case "body":
                return self._in_body(parts)
            case _:
                self._add(self._waiting, parts)
                self._waiting = ""
                return False

    def _at_start(self) -> bool:
        text = self._waiting.lstrip()
        if text.startswith(_OPENINGS):
            self._state = "header"
        elif not any(opening.startswith(text) for opening in _OPENINGS):
            self._state, self._part = "plain", _content
        return self._state != "start"

    def _begin(self, header: str, parts: list[Part]) -> None:
        """A message begins."""
        called = _NAMED.search(header)
        if called is not None and called[1] in self._names:
            self._begin_call(called[1], parts)
            return
        self._part = _reasoning if _ANALYSIS.search(header) else _content
        kind = Reasoning if self._part is _reasoning else Content
        self._gap = "\n" if kind in self._said else ""

    def _begin_call(self, name: str, parts: list[Part]) -> None:
        index, self._gap, self._part = self.calls, "", None
        if self._most is not None and index >= self._most:
            return
        self.calls += 1
        self._part = lambda text: CallArguments(index=index, text=text)
        parts.append(CallBegun(index=index, name=name))

    def _in_body(self, parts: list[Part]) -> bool:
        found = [(at, mark) for mark in _STOPS if (at := self._waiting.find(mark)) >= 0]
        if not found:
            kept = _begun_mark(self._waiting)
            text, self._waiting = self._waiting[: len(self._waiting) - kept], self._waiting[-kept:]
            self._waiting = self._waiting if kept else ""
            self._add(text, parts)
            return False
        at, mark = min(found)
        self._add(self._waiting[:at], parts)
        self._waiting = self._waiting[at + len(mark) if mark in _LAST else at :]
        self._state = "header"
        return True

    def _add(self, text: str, parts: list[Part]) -> None:
        if text and (self._part or self._state == "start"):
            part = (self._part or _content)(self._gap + text)
            self._said.add(type(part))
            self._gap = ""
            parts.append(part)


def _content(text: str) -> Part:
    return Content(text=text)


def _reasoning(text: str) -> Part:
    return Reasoning(text=text)


def _begun_mark(text: str) -> int:
    """Letters at the end that may be the beginning of a mark."""
    longest = max(map(len, _STOPS)) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(m.startswith(text[-n:]) for m in _STOPS)), 0)


def harmony_lark(
    answer: str | None, tools: Sequence[Tool], mark: Callable[[str], str], *, forced: bool
) -> str:
    """Lark for an answer that is held to something, behind reasoning that is free.

    ``answer``: rules of which the first, ``answer``, is what the final message has to be; None for
    any text. ``mark``: a mark as Lark writes it. ``forced``: it has to be a call of one of the
    tools.
    """
    channel, message, end, start = map(mark, (CHANNEL, MESSAGE, _END, _START))
    calls = [f"harmony_call_{at}" for at in range(len(tools))]
    last = calls if forced else ["harmony_final", *calls]
    final = "harmony_text" if answer is None else "answer"
    restart = f'{start} "assistant"'
    return "\n".join(
        [
            "%llguidance {}",
            f"start: harmony_thought* ({' | '.join(last)})",
            f'harmony_thought: {channel} "analysis" {message} harmony_text {end} {restart}',
            f'harmony_final: {channel} "final" {message} {final}',
            *(_call_rule(at, tool, mark) for at, tool in enumerate(tools)),
            r"harmony_text: /(.|\n)*/",
            *([] if answer is None else [answer]),
            "",
        ]
    )


def _call_rule(at: int, tool: Tool, mark: Callable[[str], str]) -> str:
    """A call in the two ways that the model knows."""
    channel, message, constrain = map(mark, (CHANNEL, MESSAGE, _CONSTRAIN))
    to = _RECIPIENT + tool.function.name
    early = f'{json.dumps(f" {to}")} {channel} "commentary "'
    late = f"{channel} {json.dumps(f'commentary {to} ')}"
    schema = json_in_lark(tool.function.schema_of_arguments)
    return f'harmony_call_{at}: ({early} | {late}) {constrain}? "json" {message} {schema}'
