"""Where a model folder has its chat templates."""

from pathlib import Path
from typing import Final

FILE: Final = "chat_template.jinja"
FOLDER: Final = "additional_chat_templates"
DEFAULT: Final = "default"
FOR_TOOLS: Final = "tool_use"
"""The template that ``transformers`` takes for chats with tools, where a model has it."""
TOOL_FILE: Final = f"{FOLDER}/{FOR_TOOLS}.jinja"


def template_files(folder: Path) -> tuple[Path, ...]:
    """Files of a folder that hold templates."""
    return folder / FILE, *sorted((folder / FOLDER).glob("*.jinja"))
