"""A ``tokenizer.json`` out of a GGUF file's vocabulary, with the ids that llama.cpp would give."""

from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.pre_tokenizers import SPLITS, pre_tokenizer

_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
"""Numbers of ``tokenizer.ggml.token_type``."""
_SPACE: Final = "▁"
"""What SentencePiece writes for a blank."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the file says about its tokens."""

    kind: str
    """``tokenizer.ggml.model``."""
    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: int | None
    eot: int | None
    eom: int | None
    """What ends an answer that calls a tool, where that is another token."""
    unknown: int | None
    padding: int | None
    adds_bos: bool
    adds_eos: bool

    def text(self, token: int | None) -> str | None:
        return None if token is None else self.tokens[token]


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """Raises ``ModelCorrupt`` or ``UnsupportedArchitecture`` with one line."""
    kind = file.text("tokenizer.ggml.model")
    if not kind:
        raise ModelCorrupt(f"{file.path}: the file has no vocabulary")
    if kind not in _BUILDERS:
        raise UnsupportedArchitecture(
            f"{file.path}: vocabulary {kind!r} is not one of: {', '.join(sorted(_BUILDERS))}"
        )
    tokens = file.texts("tokenizer.ggml.tokens")
    sentencepiece = kind == "llama"
    return Vocabulary(
        kind=kind,
        tokens=_unique(file, tokens),
        types=_types(file, len(tokens)),
        bos=_id(file, "bos", len(tokens), 1 if sentencepiece else None),
        eos=_id(file, "eos", len(tokens), 2 if sentencepiece else None),
        eot=_id(file, "eot", len(tokens)),
        eom=_id(file, "eom", len(tokens)),
        unknown=_id(file, "unknown", len(tokens), 0 if sentencepiece else None),
        padding=_id(file, "padding", len(tokens)),
        adds_bos=file.flag("tokenizer.ggml.add_bos_token", _adds_bos(file, kind)),
        adds_eos=file.flag("tokenizer.ggml.add_eos_token", False),
    )


def build_tokenizer(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    """Raises ``ModelCorrupt`` or ``UnsupportedArchitecture`` with one line."""
    tokenizer = _BUILDERS[vocabulary.kind](file, vocabulary)
    tokenizer.add_special_tokens(_added(vocabulary, (_UNKNOWN, _CONTROL), special=True))
    tokenizer.add_tokens(_added(vocabulary, (_USER_DEFINED,), special=False))
    if (around := _around(file, vocabulary)) is not None:
        tokenizer.post_processor = around
    return tokenizer


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    split = SPLITS[_split_name(file)]
    merges = [_merge(file, text) for text in file.texts("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        _bpe(
            file,
            vocab=_by_text(vocabulary),
            merges=merges,
            ignore_merges=split.ignore_merges,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    tokenizer = Tokenizer(
        _bpe(
            file,
            vocab=_by_text(vocabulary),
            merges=_merges_of_scores(vocabulary.tokens, _scores(file, len(vocabulary.tokens))),
            unk_token=vocabulary.text(vocabulary.unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = file.flag("tokenizer.ggml.add_space_prefix", True)
    blanks = normalizers.Replace(" ", _SPACE)
    # Prepend, not Metaspace: that adds nothing to a text that begins with a blank.
    steps = [normalizers.Prepend(_SPACE), blanks] if prefixed else [blanks]
    tokenizer.normalizer = normalizers.Sequence(steps)
    first = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    )
    return tokenizer


_BUILDERS: Final = {"gpt2": _byte_level, "llama": _sentencepiece}


def _bpe(file: GgufFile, **arguments: Any) -> BPE:
    try:
        return BPE(**arguments)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = str(error).splitlines()[0]
        raise ModelCorrupt(f"{file.path}: the vocabulary is not consistent: {reason}") from None


def _split_name(file: GgufFile) -> str:
    name = file.text("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise UnsupportedArchitecture(
            f"{file.path}: pre-tokenizer {name!r} is not one of: {', '.join(sorted(SPLITS))}; "
            "import the model's Hugging Face folder instead"
        )
    return name


def _adds_bos(file: GgufFile, kind: str) -> bool:
    return kind == "llama" or SPLITS[_split_name(file)].adds_bos


def _merge(file: GgufFile, text: str) -> tuple[str, str]:
    left, blank, right = text.partition(" ")
    if not (left and blank and right):
        raise ModelCorrupt(f"{file.path}: tokenizer.ggml.merges: {text!r} is not a pair")
    return left, right


def _merges_of_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose token has the highest score: as ranked merges."""
    known = dict(zip(tokens, scores, strict=True))
    found = [
        (-score, len(token[:at]), token[:at], token[at:])
        for token, score in known.items()
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _by_text(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: index for index, token in enumerate(vocabulary.tokens)}


_LONGEST: Final = 2048
"""Characters of a token: the longest that models have are blanks, some hundreds. Ways to cut a
token in two are looked at one by one."""


def _unique(file: GgufFile, tokens: list[str]) -> list[str]:
    if (longest := max(map(len, tokens), default=0)) > _LONGEST:
        raise ModelCorrupt(f"{file.path}: a token of {longest} characters, more than {_LONGEST}")
    if len(set(tokens)) == len(tokens):
        return tokens
    first: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if (other := first.setdefault(token, index)) != index:
            raise ModelCorrupt(f"{file.path}: tokens {other} and {index} are both {token[:40]!a}")
    return tokens


def _types(file: GgufFile, count: int) -> list[int]:
    types = file.numbers("tokenizer.ggml.token_type")
    if types is None:
        return [1] * count
    _same_length(file, "token_type", len(types), count)
    return [int(kind) for kind in types]


def _scores(file: GgufFile, count: int) -> list[float]:
    scores = file.numbers("tokenizer.ggml.scores")
    if scores is None:
        raise ModelCorrupt(f"{file.path}: tokenizer.ggml.scores is missing")
    _same_length(file, "scores", len(scores), count)
    return [float(score) for score in scores]


def _same_length(file: GgufFile, name: str, found: int, tokens: int) -> None:
    if found != tokens:
        raise ModelCorrupt(
            f"{file.path}: tokenizer.ggml.{name} has {found} entries for {tokens} tokens"
        )


def _id(file: GgufFile, name: str, tokens: int, default: int | None = None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.fields:
        return default if default is not None and default < tokens else None
    value = file.integer(key)
    if not 0 <= value < tokens:
        raise ModelCorrupt(f"{file.path}: {key} is {value}, but there are {tokens} tokens")
    return value


def _added(vocabulary: Vocabulary, kinds: tuple[int, ...], *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in kinds and token
    ]


def _around(file: GgufFile, vocabulary: Vocabulary) -> processors.PostProcessor | None:
    """Adds the tokens that stand before and after a text."""
    before = vocabulary.bos if vocabulary.adds_bos else None
    after = vocabulary.eos if vocabulary.adds_eos else None
    for wanted, token, name in (
        (vocabulary.adds_bos, before, "bos"),
        (vocabulary.adds_eos, after, "eos"),
    ):
        if wanted and token is None:
            raise ModelCorrupt(f"{file.path}: tokenizer.ggml.{name}_token_id is missing")
    ids = [(vocabulary.tokens[token], token) for token in (before, after) if token is not None]
    if not ids:
        return None
    single = [vocabulary.text(before), "$A", vocabulary.text(after)]
    return processors.TemplateProcessing(
        single=[piece for piece in single if piece is not None],
        pair=None,
        special_tokens=list(dict.fromkeys(ids)),
    )
