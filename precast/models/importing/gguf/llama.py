"""Models of GGUF's architecture "llama": their sizes and their ``config.json``.

Whatever the file says about the model is used or refused: a key that nothing reads would change
what the model computes without a word.
"""

from typing import Any, Final

import numpy as np

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.rope import read_rope, shortest
from precast.models.importing.gguf.tensors import ATTENTION, MLP, Sizes, biased
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
"""Under ``llama.``; the rope's scaling is read apart."""
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "use_parallel_residual": (False,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
}
"""Keys that say nothing where they have these values; others are refused."""


def read_sizes(file: GgufFile, vocabulary: Vocabulary) -> Sizes:
    """Raises ``ModelCorrupt`` or ``UnsupportedArchitecture`` with one line."""
    _check_keys(file)
    heads = _positive(file, "attention.head_count")
    hidden = _positive(file, "embedding_length")
    head_dim = _positive(file, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _positive(file, key, head_dim) != head_dim:
            raise UnsupportedArchitecture(
                f"{file.path}: llama.{key} = {_positive(file, key)} is not supported, "
                f"only the head's size, {head_dim}"
            )
    if head_dim % 2:
        raise ModelCorrupt(f"{file.path}: heads have {head_dim} features, an odd number")
    layers = _positive(file, "block_count")
    if layers > MAX_LAYERS:
        raise ModelCorrupt(f"{file.path}: llama.block_count = {layers}, more than {MAX_LAYERS}")
    return Sizes(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_positive(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp=_positive(file, "feed_forward_length"),
        vocabulary=len(vocabulary.tokens),
    )


def config_of(file: GgufFile, sizes: Sizes, vocabulary: Vocabulary) -> dict[str, Any]:
    """``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": bool(biased(file, ATTENTION)),
        "bos_token_id": vocabulary.bos,
        "dtype": "float32",
        "eos_token_id": vocabulary.eos,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": _positive(file, "context_length"),
        "mlp_bias": bool(biased(file, MLP)),
        "model_type": "llama",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "pad_token_id": vocabulary.padding,
        "rms_norm_eps": shortest(file.number("llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": read_rope(file, sizes.head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": sizes.vocabulary,
    }


def _check_keys(file: GgufFile) -> None:
    if file.integer("split.count", 1) > 1 or file.integer("split.no", 0) > 0:
        raise UnsupportedArchitecture(
            f"{file.path}: part {file.integer('split.no', 0) + 1} of a file that was split into "
            f"{file.integer('split.count', 1)}; join them with llama-gguf-split --merge first"
        )
    for key, value in file.fields.items():
        name = key.removeprefix("llama.")
        if name == key or name in _KEYS or name.startswith(("rope.scaling.", "rope.scale_linear")):
            continue
        if isinstance(value, int | float | bool) and value in _NEUTRAL.get(name, ()):
            continue
        shown = value if isinstance(value, int | float | bool | str) else "an array"
        raise UnsupportedArchitecture(
            f"{file.path}: {ascii(key)[1:-1]} = {shown} is not supported in a llama model"
        )
    if (kind := file.text("general.type", "model")) != "model":
        raise UnsupportedArchitecture(f"{file.path}: it holds {kind!a}, not a model")


def _positive(file: GgufFile, key: str, default: int | None = None) -> int:
    """A count; one for each layer is fine if they are all the same."""
    per_layer = file.fields.get(f"llama.{key}")
    if isinstance(per_layer, np.ndarray):
        values = set(per_layer.tolist())
        if len(values) != 1:
            raise UnsupportedArchitecture(f"{file.path}: llama.{key} differs between layers")
        value = int(values.pop())
    else:
        value = file.integer(f"llama.{key}", default)
    if not 0 < value < 1 << 31:
        raise ModelCorrupt(f"{file.path}: llama.{key} = {value}")
    return value
