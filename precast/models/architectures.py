"""The architectures that there are, and what each one's module has."""

from typing import Any, Protocol

from torch import Tensor

from precast.models import (
    exaone4,
    gemma3,
    glm4,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    EmbedWeights,
    HeadWeights,
    Paging,
    Rope,
    Shape,
)
from precast.models.options import Kind
from precast.models.weights.loader import Loader


class Architecture(Protocol):
    """A module of this package. All functions are pure; only ``layer`` writes, to the cache."""

    def embed(
        self, shape: Shape, token_ids: Tensor, positions: Tensor, weights: EmbedWeights
    ) -> tuple[Tensor, ...]:
        """int64 [T] ids and positions to hidden states [T, H] and each rope's cos and sin."""

    def layer(
        self,
        shape: Shape,
        kind: Kind,
        hidden: Tensor,
        rope: Rope,
        paging: Paging,
        cache: LayerCache,
        weights: Any,
    ) -> Tensor:
        """One decoder layer of the kind: [T, H] to [T, H]. ``weights`` are what ``load_layer``
        gives."""

    def head(self, shape: Shape, hidden: Tensor, weights: HeadWeights) -> Tensor:
        """Hidden states [T, H] to logits [T, this rank's part of the vocabulary]."""

    def load_layer(self, load: Loader[Any], kind: Kind, prefix: str) -> Any:
        """A layer's weights, a named tuple of tensors and lists of them. ``prefix``:
        "model.layers.7."."""

    def head_norm(self, load: Loader[Any]) -> Tensor:
        """[H]"""


_MODULES: dict[str, Architecture] = {
    "exaone4": exaone4,
    "gemma3": gemma3,
    "glm4": glm4,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
}


def architecture_of(shape: Shape) -> Architecture:
    return _MODULES[shape.architecture]
