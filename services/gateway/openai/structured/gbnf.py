"""GBNF, the grammars of llama.cpp, as Lark.

``root ::= ("yes" | "no") [0-9]+`` becomes ``start: ("yes" | "no") /[0-9]/+``. What has no
counterpart is refused by name.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_TOKENS: Final = re.compile(
    r"""(?P<blank>[ \t\r]+)|(?P<comment>\#[^\n]*)|(?P<line>\n)
    |(?P<define>::=)|(?P<name>[a-zA-Z0-9_-]+)
    |(?P<literal>"(?:[^"\\\n]|\\.)*+")|(?P<letters>\[(?:[^\]\\\n]|\\.)*+\])
    |(?P<any>\.)|(?P<repeat>[*+?]|\{\s*\d*\s*,?\s*\d*\s*\})|(?P<or>\|)
    |(?P<open>\()|(?P<close>\))|(?P<token><[^>\n]*>|!<[^>\n]*>)""",
    re.VERBOSE,
)
_HEX: Final = {"x": 2, "u": 4, "U": 8}
_PLAIN: Final = {"n": "\n", "r": "\r", "t": "\t"}
_ROOT: Final = "root"
_DEFINES: Final = re.compile(r"^\s*[a-zA-Z0-9_-]+\s*::=", re.MULTILINE)
_IN_CLASS: Final = re.compile(r"[\\\[\]^&~/-]")


class GbnfError(ValueError):
    """A grammar that can't be translated; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Token:
    kind: str
    text: str


def is_gbnf(text: str) -> bool:
    return _DEFINES.search(text) is not None


def lark_of(text: str) -> str:
    """The grammar in Lark's notation, with the rule ``root`` as ``start``. Raises ``GbnfError``."""
    tokens = list(_tokens(text))
    rules = list(_rules(tokens))
    defined = [rules_tokens[0].text for rules_tokens in rules]
    if _ROOT not in defined:
        raise GbnfError("it has no rule 'root'")
    if len(set(defined)) != len(defined):
        raise GbnfError("a rule is defined twice")
    return "".join(_rule(tokens, frozenset(defined)) for tokens in rules)


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        found = _TOKENS.match(text, at)
        if found is None:
            raise GbnfError(f"{text[at : at + 20]!r} is not understood")
        kind = str(found.lastgroup)
        if kind == "token":
            raise GbnfError(f"a token such as {found[0]} is not supported")
        if kind not in ("blank", "comment"):
            yield _Token(kind=kind, text=found[0])
        at = found.end()


def _rules(tokens: list[_Token]) -> Iterator[list[_Token]]:
    """Each rule's tokens: its name, then its body."""
    bare = [token for token in tokens if token.kind != "line"]
    starts = [at - 1 for at, token in enumerate(bare) if token.kind == "define"]
    if not starts or starts[0] != 0 or any(bare[at].kind != "name" for at in starts):
        raise GbnfError("it doesn't begin with a rule such as 'root ::= ...'")
    for start, stop in zip(starts, [*starts[1:], len(bare)], strict=True):
        yield [bare[start], *bare[start + 2 : stop]]


def _rule(tokens: list[_Token], defined: frozenset[str]) -> str:
    name, *body = tokens
    _check_brackets(name.text, body)
    shown = [("" if token.kind == "repeat" else " ") + _shown(token, defined) for token in body]
    return f"{_lark_name(name.text)}:{''.join(shown) or _EMPTY}\n"


_EMPTY: Final = ' ""'


def _check_brackets(name: str, body: list[_Token]) -> None:
    depth = 0
    for token in body:
        depth += (token.kind == "open") - (token.kind == "close")
        if depth < 0:
            break
    if depth:
        raise GbnfError(f"the brackets of rule {name!r} don't match")


def _shown(token: _Token, defined: frozenset[str]) -> str:
    match token.kind:
        case "name" if token.text not in defined:
            raise GbnfError(f"the rule {token.text!r} is not defined")
        case "name":
            return _lark_name(token.text)
        case "literal":
            return json.dumps("".join(_letters(token.text[1:-1])), ensure_ascii=False)
        case "letters":
            return _class(token.text[1:-1])
        case "any":
            return r"/(.|\n)/"
        case "repeat":
            return _repeat(token.text)
        case _:
            return token.text


def _lark_name(name: str) -> str:
    """Rules are in lower case; what GBNF allows beyond that is written with its number."""
    if name == _ROOT:
        return "start"
    safe = "".join(f"_{ord(letter)}_" if not _is_plain(letter) else letter for letter in name)
    return f"r_{safe}"


def _is_plain(letter: str) -> bool:
    return letter.isdigit() or letter.islower()


def _class(text: str) -> str:
    """``[^"\\x00-\\x1f]`` as an expression."""
    negated = text.startswith("^")
    letters = list(_letters(text.removeprefix("^"), ranges=True))
    if not letters:
        raise GbnfError("a class of letters is empty")
    inner = "".join("-" if letter == _RANGE else _in_class(letter) for letter in letters)
    return f"/[{'^' if negated else ''}{inner}]/"


_RANGE: Final = "\U0010ffff"
"""Stands for the hyphen of a range among letters."""


def _in_class(letter: str) -> str:
    if _IN_CLASS.match(letter):
        return f"\\{letter}"
    return letter if letter.isprintable() and letter != " " else f"\\u{{{ord(letter):x}}}"


def _letters(text: str, *, ranges: bool = False) -> Iterator[str]:
    """The letters of a literal or a class; ``_RANGE`` for a hyphen between two letters."""
    at = 0
    while at < len(text):
        letter, width = _escape(text, at) if text[at] == "\\" else (text[at], 1)
        between = 0 < at < len(text) - 1
        yield _RANGE if ranges and between and text[at] == "-" else letter
        at += width


def _escape(text: str, at: int) -> tuple[str, int]:
    kind = text[at + 1]
    digits = _HEX.get(kind)
    if digits is None:
        return _PLAIN.get(kind, kind), 2
    try:
        return chr(int(text[at + 2 : at + 2 + digits], 16)), 2 + digits
    except (ValueError, OverflowError):
        raise GbnfError(f"{text[at : at + 2 + digits]!r} is no character") from None


def _repeat(text: str) -> str:
    """``{2,5}`` as ``{2,5}``, which llguidance's Lark writes in the same way."""
    inner = text.strip("{}").replace(" ", "")
    if text in "*+?":
        return text
    if inner in ("", ","):
        raise GbnfError(f"the repetition {text!r} has no number")
    return "{" + (f"0{inner}" if inner.startswith(",") else inner) + "}"
