"""The Jinja environment of chat templates: what ``transformers`` gives them, in a sandbox, and with
an end.

A model folder's template is foreign code. The sandbox keeps it off Python's internals. Every turn
of a loop and every call of a macro looks at the time, so a template can't run for ever; ranges,
products and powers are bounded. Its memory is not bounded otherwise: don't serve model folders that
you don't trust with a gateway's memory.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.parser import Parser

MAX_RENDER_S: Final = 2.0
"""Time of a processor that rendering a chat may take."""
_TICKS: Final = 256
"""Turns of loops between two looks at the time."""
_MAX_PRODUCT: Final = 1 << 20
"""Items of a repeated sequence, and bits of a number."""


class TemplateTimeout(jinja2.TemplateError):
    """A template ran for too long."""


class _Budget(threading.local):
    """What the rendering of this thread has left."""

    ticks = 0
    until = 0.0


class ChatEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles chat templates. Render inside of ``limited``."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self._budget = _Budget()
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    @contextmanager
    def limited(self, seconds: float = MAX_RENDER_S) -> Iterator[None]:
        """Ends what this thread renders within it after so much of the processor's time."""
        self._budget.ticks, self._budget.until = 0, time.thread_time() + seconds
        yield

    def tick(self) -> None:
        """Called by templates in every turn of a loop and every call of a macro."""
        self._budget.ticks += 1
        if self._budget.ticks % _TICKS == 0 and time.thread_time() > self._budget.until:
            raise TemplateTimeout("it takes too long")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _product_size(operator, left, right) > _MAX_PRODUCT:
            raise jinja2.exceptions.SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for node in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
            node.body.insert(0, _tick_call())
        template.set_environment(self)
        return template


def _tick_call() -> nodes.Node:
    tick = nodes.EnvironmentAttribute("tick")
    return nodes.ExprStmt(nodes.Call(tick, [], [], None, None), lineno=1)


def _product_size(operator: str, left: Any, right: Any) -> float:
    """Items or bits of a product or power, at most; 0 where that is no matter."""
    if operator == "*":
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        counts = [side for side in (left, right) if isinstance(side, int)]
        return sizes[0] * counts[0] if sizes and counts else 0
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right)
    return 0


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what the model wrote: training looks at it, serving not."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """``dict`` without what a class has."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` without access to what begins with an underscore."""

    def __init__(*args: Any, **entries: Any) -> None:
        self, *rest = args
        values = dict(*rest, **entries)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't have {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
