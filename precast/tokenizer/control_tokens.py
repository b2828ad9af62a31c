"""Keeps the texts of a chat's messages from being read as control tokens.

A template writes control tokens (``<|im_end|>``) between texts that others wrote. Where a text
holds the name of one, marks are put into the name before the template is rendered, so that
afterwards the template's own tokens and the text's can be told apart. Such a chat is then tokenised
with other names for the control tokens, which no text can hold: in one piece, so everything else
comes out as always. Chats without such a text, which are nearly all, take the usual way.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from precast.errors import InvalidRequest

_MARK: Final = "\U000f0000"
_SEPARATOR: Final = "\U000f0001"
"""For private use. Both are removed from texts that hold the name of a control token."""

_TEMPLATES_KEYS: Final = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "id", "type"}
    | {"function", "description", "parameters", "arguments", "text"}
)
"""What templates look for. Others are of tools' parameters, whose names others have chosen."""


@dataclass(frozen=True, kw_only=True)
class _Twin:
    """The tokenizer with other names for the control tokens. They share the vocabulary's memory."""

    tokenizer: Tokenizer
    ids: Mapping[int, int]
    """From ids of added tokens in it to the tokenizer's own."""
    separator: int
    """Id of what separates letters of a name, and is no token of the chat."""


class ControlTokens:
    """One model's control tokens: the special ones, and added ones that its template writes."""

    def __init__(self, tokenizer: Tokenizer, literals: str) -> None:
        """``literals``: the texts in the chat template."""
        self._tokenizer = tokenizer
        added = sorted(tokenizer.get_added_tokens_decoder().items())
        control = {token.content: token for _, token in added if _is_control(token, literals)}
        self._ids = {number for number, token in added if token.content in control}
        self._names: Final = _pattern(control)
        foldable = [name for name, token in control.items() if token.normalized]
        self._fold = bool(foldable)
        self._folded = _pattern(_normalized(tokenizer, name) for name in foldable)
        kept = [name for name in control if _is_paired(name, control) and not control[name].special]
        self._names_in_answers: Final = _pattern(control.keys() - kept)
        self._added = added
        self._twin: _Twin | None = None

    def mark(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """The messages with a mark in each name of a control token; None if none holds any.

        An answer's own ``<think>`` and ``</think>``, where they aren't special tokens, stay what
        they are: templates look for them there.
        """
        if not any(map(self._holds, _texts(messages))):
            return None
        return [
            _replaced(
                message,
                self._names_in_answers if message.get("role") == "assistant" else self._names,
            )
            for message in messages
        ]

    def encode(self, marked: str) -> list[int]:
        """Token ids of a chat that was rendered from marked messages.

        Raises ``InvalidRequest`` if the tokenizer makes a control token out of plain text.
        """
        twin = self._twin = self._twin or self._make_twin()
        for instead in ("", _SEPARATOR):  # the vocabulary may have a control token's name itself
            (encoding,) = twin.tokenizer.encode_batch_fast(
                [self._renamed(marked, instead)], add_special_tokens=False
            )
            ids: Sequence[int] = encoding.ids
            if not any(token in self._ids and token not in twin.ids for token in ids):
                return [twin.ids.get(token, token) for token in ids if token != twin.separator]
        raise InvalidRequest("the messages have a control token that can't be written as text")

    def _holds(self, text: str) -> bool:
        if self._names.search(text):
            return True
        return self._fold and bool(self._folded.search(_normalized(self._tokenizer, text)))

    def _renamed(self, marked: str, instead: str) -> str:
        """Gives the template's tokens their names in the twin, and puts ``instead`` for marks."""
        texts = [text.replace(_MARK, instead) for text in self._names.split(marked)]
        names = [f"{_MARK}{name}" for name in self._names.findall(marked)]
        pairs = zip(texts, [*names, ""], strict=True)
        return "".join(piece for pair in pairs for piece in pair)

    def _make_twin(self) -> _Twin:
        twin = Tokenizer(self._tokenizer.model)
        if self._tokenizer.normalizer is not None:
            twin.normalizer = self._tokenizer.normalizer
        if self._tokenizer.pre_tokenizer is not None:
            twin.pre_tokenizer = self._tokenizer.pre_tokenizer
        names = {number: self._twin_name(number, token.content) for number, token in self._added}
        twin.add_tokens([_named(token, names[number]) for number, token in self._added])
        twin.add_special_tokens([AddedToken(_SEPARATOR, normalized=False)])
        return _Twin(
            tokenizer=twin,
            ids={_id_of(twin, name): number for number, name in names.items()},
            separator=_id_of(twin, _SEPARATOR),
        )

    def _twin_name(self, number: int, name: str) -> str:
        return f"{_MARK}{name}" if number in self._ids else name


def _id_of(tokenizer: Tokenizer, name: str) -> int:
    token = tokenizer.token_to_id(name)
    assert token is not None, "it was added"
    return token


def _is_control(token: AddedToken, literals: str) -> bool:
    """Blank ones, such as Gemma's line feeds, are text wherever they stand, and so are letters."""
    if token.content.isspace() or len(token.content) < 2:
        return False
    return bool(token.special or token.content in literals)


def _is_paired(name: str, names: Iterable[str]) -> bool:
    """Whether it is one of ``<x>`` and ``</x>``."""
    other = f"<{name[2:]}" if name.startswith("</") else f"</{name[1:]}"
    return name.startswith("<") and other in names


def _named(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    normalizer = tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))


def _texts(value: object) -> Iterable[str]:
    """Every text in messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _TEMPLATES_KEYS:
                yield str(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, names: re.Pattern[str]) -> Any:
    """With marks around each character of each name."""
    if isinstance(value, str):
        clean = value.replace(_MARK, "").replace(_SEPARATOR, "")
        return names.sub(lambda found: f"{_MARK}{_MARK.join(found[0])}{_MARK}", clean)
    if isinstance(value, Mapping):
        return {
            key if key in _TEMPLATES_KEYS else _replaced(key, names): _replaced(item, names)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_replaced(item, names) for item in value]
    return value


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest name at the first place. One that never matches if there are no names.

    Names with a common beginning share it in the pattern: a model may have thousands of them.
    """
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for letter in name:
            node = node.setdefault(letter, {})
        if name:
            node[""] = {}
    return re.compile(_alternatives(tree) or "(?!)")


def _alternatives(tree: Mapping[str, Any]) -> str:
    """Written without recursion for each letter: names may be long."""
    choices = []
    for letter, node in tree.items():
        if not letter:
            continue
        text = re.escape(letter)
        while len(node) == 1 and "" not in node:
            ((following, node),) = node.items()
            text += re.escape(following)
        choices.append(text + _alternatives(node))
    if not choices:
        return ""
    return f"(?:{'|'.join(choices)}){'?' if '' in tree else ''}"
