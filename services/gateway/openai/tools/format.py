"""What there is to say of a model's way to write calls."""

from dataclasses import dataclass

from services.gateway.openai.tools.reader import Syntax


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """One format. Nothing in it depends on a request."""

    name: str
    """As ``tool_parser`` has it."""
    syntax: Syntax
    seen_in: tuple[str, ...] = ()
    """Texts of a chat template that mean this format."""
    strict_head: str = '{{"name": {name}, "arguments": '
    """How a call begins that a grammar writes, behind the mark; ``name`` is put in as JSON."""
    strict_tail: str = "}"
    can_be_strict: bool = True
    """Whether arguments are JSON, which a schema can be enforced on."""
    instructs: bool = False
    """The template knows no tools: they are explained in a message of the system."""
    typed: bool = False
    """The body of calls is made with the schemas of the functions' arguments, by their names."""
    short_ids: bool = False
    """Calls' ids are nine letters and digits, as the template demands."""
