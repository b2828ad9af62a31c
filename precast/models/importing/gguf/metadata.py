"""A model's sizes, and which of its metadata are understood.

Whatever a file says about the model is used or refused: a key that nothing reads would change what
the model computes without a word.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.tokenizer import Vocabulary

MAX_LAYERS: Final = 1024
_KEYS: Final = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "vocab_size",
        "rope.dimension_count",
        "rope.freq_base",
    }
)
"""Under the architecture's name; the rope's scaling is read apart."""
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "nextn_predict_layers": (0,),
    "leading_dense_block_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "use_parallel_residual": (False,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
}
"""Keys that say nothing where they have these values; others are refused."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    mlp: int
    vocabulary: int
    """Rows of the embedding; the tokenizer may have fewer tokens."""
    experts: int = 0
    expert_mlp: int = 0
    shared_mlp: int = 0
    """Of an expert that all tokens go through."""


class Metadata:
    """A file's entries under its architecture's name. Every method raises ``ModelCorrupt`` or
    ``UnsupportedArchitecture`` with one line."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def has(self, name: str) -> bool:
        return self.key(name) in self.file.fields

    def integer(self, name: str, default: int | None = None) -> int:
        return self.file.integer(self.key(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        return self.file.number(self.key(name), default)

    def text(self, name: str, default: str = "") -> str:
        return self.file.text(self.key(name), default)

    def flags(self, name: str, count: int) -> list[bool] | None:
        """One for each layer; None if there are none."""
        value = self.file.fields.get(self.key(name))
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise UnsupportedArchitecture(
                f"{self.file.path}: {self.key(name)} is not an array of {count} flags"
            )
        return [bool(one) for one in value]

    def positive(self, name: str, default: int | None = None) -> int:
        """A count; one for each layer is fine if they are all the same."""
        per_layer = self.file.fields.get(self.key(name))
        if isinstance(per_layer, np.ndarray):
            values = set(per_layer.tolist())
            if len(values) != 1:
                raise UnsupportedArchitecture(
                    f"{self.file.path}: {self.key(name)} differs between layers"
                )
            value = int(values.pop())
        else:
            value = self.integer(name, default)
        if not 0 < value < 1 << 31:
            raise ModelCorrupt(f"{self.file.path}: {self.key(name)} = {value}")
        return value


def read_sizes(
    data: Metadata, vocabulary: Vocabulary, *, partly_rotated: bool, experts: bool, shared: bool
) -> Sizes:
    file = data.file
    heads = data.positive("attention.head_count")
    hidden = data.positive("embedding_length")
    head_dim = data.positive("attention.key_length", hidden // heads)
    rotary_dim = data.positive("rope.dimension_count", head_dim)
    same = {"attention.value_length": data.positive("attention.value_length", head_dim)}
    if not partly_rotated:
        same["rope.dimension_count"] = rotary_dim
    for name, value in same.items():
        if value != head_dim:
            raise UnsupportedArchitecture(
                f"{file.path}: {data.key(name)} = {value} is not supported, "
                f"only the head's size, {head_dim}"
            )
    if rotary_dim % 2 or head_dim % 2 or rotary_dim > head_dim:
        raise ModelCorrupt(f"{file.path}: heads rotate {rotary_dim} of {head_dim} features")
    layers = data.positive("block_count")
    if layers > min(MAX_LAYERS, len(file.tensors)):
        raise ModelCorrupt(
            f"{file.path}: {data.key('block_count')} = {layers}, more than {MAX_LAYERS} or than "
            f"the file's {len(file.tensors)} tensors"
        )
    mlp = data.positive("feed_forward_length")
    return Sizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=data.positive("attention.head_count_kv", heads),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        mlp=mlp,
        vocabulary=_vocabulary_rows(file, vocabulary),
        experts=data.positive("expert_count") if experts else 0,
        expert_mlp=data.positive("expert_feed_forward_length", mlp) if experts else 0,
        shared_mlp=data.positive("expert_shared_feed_forward_length") if shared else 0,
    )


def check_keys(data: Metadata, known: frozenset[str]) -> None:
    """``known``: what the architecture reads beside what all have."""
    file = data.file
    for key, value in file.fields.items():
        name = key.removeprefix(f"{data.architecture}.")
        if name == key or name in _KEYS or name in known:
            continue
        if name.startswith(("rope.scaling.", "rope.scale_linear")):
            continue
        if isinstance(value, int | float | bool) and value in _NEUTRAL.get(name, ()):
            continue
        shown = value if isinstance(value, int | float | bool | str) else "an array"
        raise UnsupportedArchitecture(
            f"{file.path}: {ascii(key)[1:-1]} = {shown} is not supported in a "
            f"{data.architecture} model"
        )
    if (kind := file.text("general.type", "model")) != "model":
        raise UnsupportedArchitecture(f"{file.path}: it holds {kind!a}, not a model")


def _vocabulary_rows(file: GgufFile, vocabulary: Vocabulary) -> int:
    """Embeddings may be padded behind the last token."""
    entry = file.tensors.get("token_embd.weight")
    rows = entry.shape[0] if entry is not None else 0
    if entry is not None and rows < len(vocabulary.tokens):
        raise ModelCorrupt(
            f"{file.path}: the vocabulary has {len(vocabulary.tokens)} tokens, "
            f"its embedding {rows} rows"
        )
    return max(rows, len(vocabulary.tokens))
