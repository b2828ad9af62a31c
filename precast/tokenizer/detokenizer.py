"""Token ids to text, as they come.

Text is given out only when no later token can change it: an incomplete character waits for its
other bytes, and text that may turn out to be the beginning of a stop string waits until it can't.
"""

from typing import Final

from tokenizers import Tokenizer

_CONTEXT: Final = 6
"""Prompt tokens to decode in front of the first output: some tokenizers' spaces depend on them."""
_REPLACEMENT: Final = "\ufffd"
_MAX_INCOMPLETE: Final = 16
"""Tokens after which a replacement character is taken for what the model meant."""


class Detokenizer:
    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stop_strings: tuple[str, ...] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stop_strings
        self._ids = prompt[-_CONTEXT:]
        self._prefix = 0
        self._read = len(self._ids)
        """Tokens before this are in the text already; those from _prefix on are decoded again with
        what follows, because the text of a token depends on its neighbours."""
        self._held = ""

    def push(self, token_ids: list[int]) -> tuple[str, bool]:
        """Text that can be sent now, and whether a stop string was hit (nothing follows then)."""
        self._ids += token_ids
        self._held += self._decode_new(final=False)
        stop_at = self._find_stop()
        if stop_at >= 0:
            text, self._held = self._held[:stop_at], ""
            return text, True
        keep = self._possible_stop()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def flush(self) -> str:
        """The rest: no token follows, so what was held back is text after all."""
        text, self._held = self._held + self._decode_new(final=True), ""
        return text

    def piece(self, token_id: int) -> str:
        """One token's own text, for logprobs."""
        return self._decode([token_id]) or self._tokenizer.id_to_token(token_id) or ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _decode_new(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._prefix : self._read])
        now = self._decode(self._ids[self._prefix :])
        incomplete = now.endswith(_REPLACEMENT) and len(self._ids) - self._read < _MAX_INCOMPLETE
        if len(now) <= len(before) or (incomplete and not final):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        if self._prefix > 64:
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        return now[len(before) :]

    def _find_stop(self) -> int:
        """Where the first stop string in the held text begins, or -1."""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found, default=-1)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
