"""What one request does with tools: what the template gets, what the worker is held to, and how
the answer is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

from services.gateway.openai.errors import invalid
from services.gateway.openai.tools.fields import AllowedChoice, NamedChoice, Tool, ToolFields
from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.grammar import forced_schema
from services.gateway.openai.tools.reader import CallReader, Syntax

_FORCED: Final = Syntax(bare=True)
"""An answer that a schema makes a call, or a list of calls."""


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools that a request may use; there is at least one."""

    form: ToolFormat
    tools: tuple[Tool, ...]
    mode: Literal["auto", "forced"]
    several: bool
    """Whether more than one call is allowed."""
    places: tuple[int, ...] = ()
    """Of these tools among the request's."""

    @property
    def shown(self) -> list[dict[str, Any]]:
        """As chat templates get them."""
        return [tool.shown() for tool in self.tools]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.tools)

    @property
    def strict(self) -> bool:
        """Whether some arguments have to follow their schema although the call is optional."""
        return self.mode == "auto" and any(tool.function.strict for tool in self.tools)

    def holds(self, tool: Tool) -> bool:
        """Whether calls of the tool are held to its schema."""
        return self.mode == "forced" or bool(tool.function.strict)

    @property
    def syntax(self) -> Syntax:
        if self.mode == "forced":
            return _FORCED
        found = self.form.syntax
        if self.form.typed:
            schemas = {tool.function.name: tool.function.schema_of_arguments for tool in self.tools}
            found = replace(found, body=partial(found.body, schemas))
        if self.strict and found.begins:  # the grammar knows calls by their marks alone
            return replace(found, bare=found.bare and not self.form.instructs)
        return found

    def schema(self) -> dict[str, Any]:
        """What a forced answer has to be."""
        return forced_schema(self.tools, several=self.several)

    def reader(self) -> CallReader:
        most = {} if self.several else {"most": 1}
        return CallReader(self.syntax, names=self.names, **most)


def tool_use(body: ToolFields, form: ToolFormat | None) -> ToolUse | None:
    """None where no tools are offered. Raises ``ApiError`` 400 if the model can't have any."""
    choice = body.tool_choice or "auto"
    _check_names(body)
    if not body.tools or choice == "none":
        return None
    if form is None:
        raise invalid("'tools' are switched off for this server.", "tools", "unsupported_parameter")
    forced = choice == "required" or isinstance(choice, NamedChoice) or _requires(choice)
    named = isinstance(choice, NamedChoice)
    places = tuple(_offered(body.tools, choice))
    use = ToolUse(
        form=form,
        tools=tuple(body.tools[place] for place in places),
        places=places,
        mode="forced" if forced else "auto",
        several=body.parallel_tool_calls is not False and not named,
    )
    if use.strict and not form.can_be_strict:
        reason = f"calls in the format {form.name!r} can't be held to a schema"
        raise invalid(f"Invalid 'tools': strict is not supported, for {reason}.", "tools")
    return use


def _check_names(body: ToolFields) -> None:
    """Raises ``ApiError`` 400 for names that are there twice, or chosen and not there."""
    names = [tool.function.name for tool in body.tools or ()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise invalid(f"Invalid 'tools': two functions have the name {twice!r}.", "tools")
    unknown = next((name for name in _chosen(body.tool_choice) if name not in names), None)
    if unknown is not None:
        reason = f"it names {unknown!r}, which is not in tools"
        raise invalid(f"Invalid 'tool_choice': {reason}.", "tool_choice")
    if body.tool_choice == "required" and not names:
        raise invalid("'tool_choice' can't be required without tools.", "tool_choice")


def _chosen(choice: object) -> list[str]:
    if isinstance(choice, NamedChoice):
        return [choice.function.name]
    if isinstance(choice, AllowedChoice):
        return [one.function.name for one in choice.allowed_tools.tools]
    return []


def _requires(choice: object) -> bool:
    return isinstance(choice, AllowedChoice) and choice.allowed_tools.mode == "required"


def _offered(tools: Sequence[Tool], choice: object) -> list[int]:
    """Their places."""
    chosen = _chosen(choice)
    return [place for place, tool in enumerate(tools) if not chosen or tool.function.name in chosen]
