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


_CASED_PARTS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED: Final = rf"{_CASED_PARTS[0]}|{_CASED_PARTS[1]}|\p{{N}}{_REST}"
_CONTRACTED: Final = (
    rf"{_CASED_PARTS[0]}{_CONTRACTIONS}?|{_CASED_PARTS[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_REST}"
)
_IDEOGRAPHS: Final = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_3: Final = Split(
    patterns=(
        r"\p{N}{1,3}",
        _IDEOGRAPHS,
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_SINGLE_DIGITS: Final = Split(patterns=(r"\p{N}", _GPT2))
_PLAIN: Final = Split(patterns=(_GPT2,))
_WORDS_1: Final = Split(patterns=(_words(r"\p{N}"),))
_WORDS_3: Final = Split(patterns=(_words(r"\p{N}{1,3}"),))
_LLAMA_3: Final = Split(patterns=_WORDS_3.patterns, ignore_merges=True, adds_bos=True)
_GPT_4O: Final = Split(patterns=(_CONTRACTED,))
_MARKED: Final = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED: Final = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM: Final = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

SPLITS: Final = {
    "default": Split(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    **dict.fromkeys(
        (
            *("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "exaone4"),
            *("a.x-4.0", "mellum", "gigachat", "modern-bert", "jina-es", "jina-de"),
        ),
        _PLAIN,
    ),
    **dict.fromkeys(
        (
            *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
            "mellum2",
        ),
        _SINGLE_DIGITS,
    ),
    **dict.fromkeys(
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
            "lfm2",
        ),
        _LLAMA_3,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _WORDS_3),
    "glm4": Split(patterns=_WORDS_3.patterns, ignore_merges=True),
    **dict.fromkeys(
        (
            *("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2", "kormo"),
            "solar-open",
        ),
        _WORDS_1,
    ),
    "qwen35": Split(patterns=(_MARKED,)),
    "seed-coder": Split(patterns=(_SEED,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT_4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK_3),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Split(patterns=(_BLOOM,))),
    "viking": Split(patterns=(_BLOOM, r"\p{N}")),
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
