"""What the text of an answer consists of: content, reasoning and calls of tools."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CallBegun:
    """A call of a tool; its arguments follow."""

    index: int
    """Among the calls of the answer, from 0."""
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CallArguments:
    """The next letters of a call's arguments, which are JSON together."""

    index: int
    text: str


Part = Content | Reasoning | CallBegun | CallArguments
