"""The formats there are, and which one a model's chat template means."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from services.gateway.openai.tools import (
    gemma,
    generic,
    glm,
    hermes,
    llama,
    mistral,
    phi,
    qwen_coder,
)
from services.gateway.openai.tools.format import ToolFormat

_BY_TEMPLATE: Final = (
    *(gemma.FORMAT, mistral.FORMAT, phi.FORMAT, qwen_coder.FORMAT, hermes.FORMAT, llama.FORMAT),
    glm.FORMAT,
)
"""In this order: marks of the first ones are in no template of the later ones."""
FORMATS: Final[Mapping[str, ToolFormat]] = {
    one.name: one for one in (*_BY_TEMPLATE, generic.FORMAT)
}
_KNOWS_TOOLS: Final = re.compile(r"\btools\b")


def knows_tools(template: str) -> bool:
    """Whether a chat template shows tools by itself."""
    return _KNOWS_TOOLS.search(template) is not None


def format_of(template: str, parser: str = "auto") -> ToolFormat | None:
    """The format for a chat template's text; ``parser`` names another one, or none."""
    if parser != "auto":
        return FORMATS.get(parser)
    if not knows_tools(template):
        return generic.FORMAT
    for one in _BY_TEMPLATE:
        if any(mark in template for mark in one.seen_in):
            return one
    return replace(generic.FORMAT, instructs=False)
