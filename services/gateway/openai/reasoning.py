"""Tells a model's reasoning from its answer: ``<think>...</think>`` in front of it."""

from typing import Final

from services.gateway.openai.parts import Content, Part, Reasoning

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class ReasoningReader:
    """Reads a text piece by piece. However it is cut, the parts, joined, are the same."""

    def __init__(self, *, opened: bool) -> None:
        """``opened``: the prompt ends within the reasoning."""
        self._state = "reasoning" if opened else "start"
        self._waiting = ""
        """Text that may be the beginning of a mark, or blanks at an edge."""
        self._begun = False
        """Whether something of the reasoning was shown."""

    @property
    def done(self) -> bool:
        """Whether all that follows is content."""
        return self._state == "content" and not self._waiting

    def feed(self, text: str) -> list[Part]:
        self._waiting += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def end(self) -> list[Part]:
        """What is left when the text is over."""
        rest, self._waiting = self._waiting, ""
        if not rest or self._state == "after":
            return []
        if self._state != "reasoning":
            return [Content(text=rest)]
        shown = rest.rstrip() if self._begun else rest.strip()
        return [Reasoning(text=shown)] if shown else []

    def _advance(self, parts: list[Part]) -> bool:
        """One step; whether there may be another."""
        match self._state:
            case "start":
                return self._at_start()
            case "reasoning":
                return self._within(parts)
            case "after":
                self._waiting = self._waiting.lstrip()
                self._state = "content" if self._waiting else "after"
                return bool(self._waiting)
            case _:
                if self._waiting:
                    parts.append(Content(text=self._waiting))
                self._waiting = ""
                return False

    def _at_start(self) -> bool:
        """Reasoning can only come first."""
        text = self._waiting.lstrip()
        if text.startswith(OPEN):
            self._state, self._waiting = "reasoning", text[len(OPEN) :]
            return True
        if not OPEN.startswith(text):
            self._state = "content"
            return True
        return False

    def _within(self, parts: list[Part]) -> bool:
        if not self._begun:
            self._waiting = self._waiting.lstrip()
        text, close, rest = self._waiting.partition(CLOSE)
        if close:
            shown, self._waiting, self._state = text.rstrip(), rest, "after"
        else:
            kept = _kept_back(text)
            shown, self._waiting = text[: len(text) - kept], text[len(text) - kept :]
        if shown:
            self._begun = True
            parts.append(Reasoning(text=shown))
        return bool(close)


def _kept_back(text: str) -> int:
    """Letters at the end that may be blanks before the mark, and the beginning of it."""
    begun = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip())
