"""GLM-4 and GLM-Z1 (0414): an answer that is the function's name, and its arguments as JSON on the
line below."""

from collections.abc import Collection
from typing import Final

from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.json_text import ValueSpan
from services.gateway.openai.tools.reader import Syntax

_BLANKS: Final = " \t\r"
_MAX_HEAD: Final = 256
"""Letters of the name and the blanks around it."""


class NamedCall:
    """A call of a function that there is."""

    def __init__(self, names: Collection[str]) -> None:
        self.name = ""
        self.begun = self.done = self.wrong = False
        self._names = names
        self._head = ""
        self._span = ValueSpan()

    def feed(self, letter: str) -> str:
        if not self.begun:
            self._feed_head(letter)
        if not self.begun:
            return ""
        self.done = self._span.feed(letter) == "last"
        return letter

    def _feed_head(self, letter: str) -> None:
        line, newline, below = (self._head + letter).partition("\n")
        name = line.rstrip(_BLANKS)
        if below.strip() == "{":
            self.name, self.begun = name, True
            return
        self._head += letter
        begins = not newline and any(one.startswith(line) for one in self._names)
        whole = name in self._names and not below.strip()
        self.wrong = not (begins or whole) or len(self._head) > _MAX_HEAD


FORMAT: Final = ToolFormat(
    name="glm4",
    syntax=Syntax(bare=True, bare_body=NamedCall),
    seen_in=("Json 格式表示调用的参数",),
    head="{plain}\n",
    tail="",
)
