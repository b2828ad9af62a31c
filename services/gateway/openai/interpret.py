"""How an answer is read: its reasoning, its content and its calls of tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from services.gateway.openai.harmony import MARKS as HARMONY_MARKS
from services.gateway.openai.harmony import HarmonyReader
from services.gateway.openai.parts import Content, Part, Reasoning
from services.gateway.openai.reasoning import CLOSE, OPEN, ReasoningReader
from services.gateway.openai.tools.reader import CallReader
from services.gateway.openai.tools.use import ToolUse

Thinking = Literal["none", "maybe", "opened"]
"""Whether an answer may begin with reasoning, or goes on with one that the prompt has begun."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The same for all choices of a request."""

    thinking: Thinking = "none"
    show_reasoning: bool = True
    marks_of_thought: tuple[int | None, int | None] = (None, None)
    """Ids of the tokens that begin and end reasoning, where each is one token."""
    tools: ToolUse | None = None
    harmony: bool = False
    """Whether answers are messages in channels, calls among them."""

    @property
    def is_plain(self) -> bool:
        """Whether an answer's text is its content."""
        return self.thinking == "none" and self.tools is None and not self.harmony

    @property
    def marks(self) -> tuple[str, ...]:
        """What has to be in the text for it to be read, even if these are special tokens."""
        if self.harmony:
            return HARMONY_MARKS
        thoughts = () if self.thinking == "none" else (OPEN, CLOSE)
        syntax = None if self.tools is None else self.tools.syntax
        return thoughts if syntax is None else (*thoughts, *syntax.begins, *syntax.ends)


PLAIN: Final = Reading()


def thinking_of(template: str, prompt: str, parser: str) -> Thinking:
    """``template``: its text; ``prompt``: what it has written; ``parser``: auto, think or none."""
    knows = OPEN in template or CLOSE in template
    if parser == "none" or (parser == "auto" and not knows):
        return "none"
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return "opened"
    return "none" if end.endswith(CLOSE) else "maybe"


class ThoughtCounter:
    """Counts the tokens of one answer's reasoning, its marks included."""

    def __init__(self, reading: Reading) -> None:
        self.count = 0
        self._begin, self._end = reading.marks_of_thought
        self._over = reading.thinking == "none" or self._end is None
        self._begun = reading.thinking == "opened"

    def add(self, token_ids: Sequence[int]) -> None:
        """The answer's next tokens."""
        if self._over or not token_ids:
            return
        if not self._begun and token_ids[0] != self._begin:
            self._over = True
            return
        self._begun = True
        self._over = self._end in token_ids
        thought = token_ids.index(self._end) + 1 if self._end in token_ids else len(token_ids)
        self.count += thought


def _calls_of(reading: Reading) -> CallReader | HarmonyReader | None:
    use = reading.tools
    if reading.harmony:
        names = frozenset[str]() if use is None else use.names
        return HarmonyReader(names, most=None if use is None or use.several else 1)
    return None if use is None else use.reader()


class AnswerReader:
    """Reads one choice, piece by piece."""

    def __init__(self, reading: Reading) -> None:
        opened = reading.thinking == "opened"
        self._reasoning = None if reading.thinking == "none" else ReasoningReader(opened=opened)
        self._show_reasoning = reading.show_reasoning
        self._calls = _calls_of(reading)

    @property
    def has_calls(self) -> bool:
        return self._calls is not None and self._calls.calls > 0

    def feed(self, text: str) -> list[Part]:
        if self._reasoning is None:
            return self._content(text)
        return self._read(self._reasoning.feed(text))

    def end(self) -> list[Part]:
        """What is left when the text is over."""
        last = [] if self._reasoning is None else self._read(self._reasoning.end())
        return last if self._calls is None else [*last, *self._wanted(self._calls.end())]

    def _read(self, parts: list[Part]) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                found += self._content(part.text)
            elif self._show_reasoning or not isinstance(part, Reasoning):
                found.append(part)
        return found

    def _content(self, text: str) -> list[Part]:
        if self._calls is not None:
            return self._wanted(self._calls.feed(text))
        return [Content(text=text)] if text else []

    def _wanted(self, parts: list[Part]) -> list[Part]:
        if self._show_reasoning:
            return parts
        return [part for part in parts if not isinstance(part, Reasoning)]
