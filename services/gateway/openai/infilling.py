"""Prompts with a text after the answer, for models that have tokens for it."""

from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer

from services.gateway.openai.errors import invalid


@dataclass(frozen=True, kw_only=True)
class Infilling:
    """Ids of the tokens in front of the text before, the text after, and the answer."""

    before: int
    after: int
    middle: int

    def prompt(self, prefix: list[int], suffix: list[int]) -> list[int]:
        return [self.before, *prefix, self.after, *suffix, self.middle]


_NAMES: Final = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<|fim▁begin|>", "<|fim▁hole|>", "<|fim▁end|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


def infilling_of(tokenizer: Tokenizer, model: str) -> Infilling:
    """Raises ``ApiError`` 400 where the model has no such tokens."""
    for names in _NAMES:
        before, after, middle = (tokenizer.token_to_id(name) for name in names)
        if before is not None and after is not None and middle is not None:
            return Infilling(before=before, after=after, middle=middle)
    message = f"'suffix' is not supported: the model {model!r} has no tokens for infilling."
    raise invalid(message, "suffix", "unsupported_parameter")
