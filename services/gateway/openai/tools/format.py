"""What there is to say of a model's way to write calls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from services.gateway.openai.tools.reader import Syntax


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """One format. Nothing in it depends on a request."""

    name: str
    """As ``tool_parser`` has it."""
    syntax: Syntax
    seen_in: tuple[str, ...] = ()
    """Texts of a chat template that mean this format."""
    head: str = '{{"name": {name}, "arguments": '
    """How a call begins, behind the mark; ``name`` is put in as JSON, ``plain`` as it is."""
    tail: str = "}"
    can_be_strict: bool = True
    """Whether arguments are JSON, which a schema can be enforced on."""
    instructs: bool = False
    """The template knows no tools: they are explained in a message of the system."""
    typed: bool = False
    """The body of calls is made with the schemas of the functions' arguments, by their names."""
    short_ids: bool = False
    """Calls' ids are nine letters and digits, as the template demands."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Those that the format writes around a call."""
        return (*self.syntax.begins[:1], *self.syntax.ends)

    def written(
        self, function: Mapping[str, Any], instead: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """A call as a model writes it, of ``name`` and ``arguments``; ``instead``: of marks."""
        mark = "".join(self.syntax.begins[:1])
        tail = self.tail
        for own, other in instead.items():
            mark, tail = mark.replace(own, other), tail.replace(own, other)
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return f"{mark}{self.head_of(function['name'])}{arguments}{tail}"

    def head_of(self, function: str) -> str:
        return self.head.format(name=json.dumps(function, ensure_ascii=False), plain=function)
