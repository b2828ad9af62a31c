"""How byte-level vocabularies cut text into words, by the name that a GGUF file gives.

The file holds the name only (``tokenizer.ggml.pre``); the patterns are those that the models were
trained with. ``tests/data/gguf_tokens.json`` has ids by llama.cpp for what is here.
"""

from dataclasses import dataclass
from typing import Final

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one family of vocabularies treats text."""

    patterns: tuple[str, ...]
    """Each cuts the pieces that the one before has left: matches are pieces of their own."""
    ignore_merges: bool = False
    """A piece that is a token is taken whole, whatever the merges say."""
    adds_bos: bool = False
    """Unless the file says otherwise."""


_CONTRACTIONS: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2: Final = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)  # fmt: skip


def _words(digits: str) -> str:
    """Llama 3's pattern; ``digits``: how many make one piece."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_CASED: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SINGLE_DIGITS: Final = Split(patterns=(r"\p{N}", _GPT2))
_WORDS_3: Final = Split(patterns=(_words(r"\p{N}{1,3}"),))

SPLITS: Final = {
    "default": Split(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    "gpt-2": Split(patterns=(_GPT2,)),
    "phi-2": Split(patterns=(_GPT2,)),
    "olmo": Split(patterns=(_GPT2,)),
    "mpt": Split(patterns=(_GPT2,)),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "exaone": _SINGLE_DIGITS,
    "minerva-7b": _SINGLE_DIGITS,
    "llama-bpe": Split(patterns=_WORDS_3.patterns, ignore_merges=True, adds_bos=True),
    "llama3": Split(patterns=_WORDS_3.patterns, ignore_merges=True, adds_bos=True),
    "llama-v3": Split(patterns=_WORDS_3.patterns, ignore_merges=True, adds_bos=True),
    "falcon3": Split(patterns=_WORDS_3.patterns, ignore_merges=True, adds_bos=True),
    "dbrx": _WORDS_3,
    "smaug-bpe": _WORDS_3,
    "qwen2": Split(patterns=(_words(r"\p{N}"),)),
    "deepseek-r1-qwen": Split(patterns=(_words(r"\p{N}"),)),
    "stablelm2": Split(patterns=(_words(r"\p{N}"),)),
    "deepseek-coder": Split(
        patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
    ),
    "falcon": Split(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "tekken": Split(patterns=(_CASED,), ignore_merges=True, adds_bos=True),
}


def pre_tokenizer(split: Split) -> pre_tokenizers.PreTokenizer:
    """Cuts into words, then writes their bytes in the vocabulary's letters."""
    cuts = [
        pre_tokenizers.Split(Regex(pattern), "isolated", invert=False) for pattern in split.patterns
    ]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, letters])
