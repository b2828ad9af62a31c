"""Token ids to text, as they come.

Text is given out only when no later token can change it: an incomplete character waits for its
other bytes, and text that may turn out to be the beginning of a stop string waits until it can't.
The work for a token doesn't depend on how many tokens came before it.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from precast.tokenizer.stop_strings import StopStrings
from precast.tokenizer.token_table import TokenTable

_CONTEXT: Final = 6
"""Tokens to decode in front of a new one where its text depends on them."""
_REPLACEMENT: Final = "\ufffd"
_MAX_WAITING: Final = 16
"""Tokens without text of their own after which what they decode to is taken as it is."""


class _Decoder(Protocol):
    def push(self, token_id: int) -> str:
        """Whole characters that the token completes."""

    def flush(self) -> str:
        """What is left of an incomplete character."""


class Detokenizer:
    """The text of one answer. It continues the prompt, so a first blank belongs to it."""

    def __init__(
        self,
        table: TokenTable,
        prompt: Sequence[int],
        stop_strings: Sequence[str] = (),
        *,
        keep_stop_string: bool = False,
        show_special_tokens: bool = False,
    ) -> None:
        """``keep_stop_string``: the stop string that is hit is text. ``show_special_tokens``: the
        names of special tokens are."""
        self._decoder: _Decoder = (
            _Bytes(table, show_special_tokens)
            if table.has_bytes
            else _Window(table, prompt, show_special_tokens)
        )
        self._stops = StopStrings(stop_strings)
        self._keep_stop_string = keep_stop_string
        self._may_stop = bool(stop_strings)
        self._held = ""
        self.stop_string = ""
        """The one that was hit."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing is looked for in the text."""
        return not self._may_stop

    @property
    def push_plain(self) -> Callable[[int], str]:
        """``push_token`` where it ``is_plain``."""
        return self._decoder.push

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """Text that can be sent now, and whether a stop string was hit (nothing follows then)."""
        return self._release("".join(map(self._decoder.push, token_ids)))

    def push_token(self, token_id: int, *, may_stop: bool = True) -> tuple[str, bool]:
        """``push`` of one token. Stop strings begin behind the last one that may not stop."""
        text = self._decoder.push(token_id)
        return self._release(text) if self._may_stop and may_stop else (text, False)

    def flush(self) -> str:
        """The rest: no token follows, so what was held back is text after all."""
        text, stopped = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        return text if stopped else text + held

    def _release(self, new: str) -> tuple[str, bool]:
        held = self._held + new
        stop = self._stops.feed(new)
        if stop is not None:
            self._held, self.stop_string = "", stop.text
            end = len(held) - len(new) + stop.end
            return held[: end if self._keep_stop_string else end - len(stop.text)], True
        cut = len(held) - self._stops.begun
        self._held = held[cut:]
        return held[:cut], False


class _Bytes:
    """Joins the tokens' bytes."""

    def __init__(self, table: TokenTable, show_special: bool) -> None:
        self._table = table
        self._show_special = show_special
        self._texts = table.whole_texts
        self._held = b""
        """A part of a character."""

    def push(self, token_id: int) -> str:
        if self._show_special and self._table.is_special(token_id):
            return self._decode(self._table.name(token_id).encode())
        # Most tokens are whole characters that follow whole characters: a look-up, and no more.
        if not self._held and (text := self._texts.get(token_id)) is not None:
            return text
        return self._decode(self._table.bytes_of(token_id))

    def _decode(self, added: bytes, *, final: bool = False) -> str:
        known = self._held + added
        text, used = codecs.utf_8_decode(known, "replace", final)
        self._held = known[used:]
        return text

    def flush(self) -> str:
        return self._decode(b"", final=True)


class _Window:
    """Decodes each token together with a few before it."""

    def __init__(self, table: TokenTable, prompt: Sequence[int], show_special: bool) -> None:
        self._table = table
        self._show_special = show_special
        self._ids = [token for token in prompt[-_CONTEXT:] if self._has_text(token)]
        self._given = len(self._ids)
        """Tokens before this are in the text already."""

    def push(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        self._ids.append(token_id)
        return self._new(final=len(self._ids) - self._given >= _MAX_WAITING)

    def flush(self) -> str:
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        before = self._decode(self._ids[: self._given])
        now = self._decode(self._ids)
        if not final and (len(now) <= len(before) or now.endswith(_REPLACEMENT)):
            return ""
        del self._ids[:-_CONTEXT]
        self._given = len(self._ids)
        return now[len(before) :]

    def _has_text(self, token_id: int) -> bool:
        """A run of tokens without text would make the window grow."""
        return self._show_special or not self._table.is_special(token_id)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._table.tokenizer.decode(ids, skip_special_tokens=not self._show_special)
        return text
