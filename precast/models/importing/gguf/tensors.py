"""The tensors of a model of GGUF's architecture "llama", each by both of its names.

Every tensor that the model has must be in the file, and every one in the file must be the model's:
nothing is made up, and nothing dropped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.rope import FREQUENCIES

ATTENTION: Final = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP: Final = ("ffn_gate", "ffn_up", "ffn_down")
_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One tensor of the Hugging Face folder and where it comes from."""

    name: str
    source: str | None
    """The file's tensor; None: zeros."""
    shape: tuple[int, ...]
    heads: int = 0
    """Rows are this many heads whose halves GGUF interleaves; 0: rows stay where they are."""


def wanted_tensors(file: GgufFile, sizes: Sizes) -> list[Wanted]:
    """All of the folder's tensors. Raises where the file has others, more, or fewer."""
    wanted = [*_outer(file, sizes), *_layers(file, sizes)]
    missing = [t.source for t in wanted if t.source and t.source not in file.tensors]
    if missing:
        raise ModelCorrupt(
            f"{file.path}: tensor {missing[0]} is missing{_and_more(len(missing))}; "
            f"it has {len(file.tensors)} tensors"
        )
    unused = sorted(set(file.tensors) - {t.source for t in wanted} - {FREQUENCIES})
    if unused:
        raise UnsupportedArchitecture(
            f"{file.path}: tensor {unused[0]!a} is not one of a llama model's"
            f"{_and_more(len(unused))}"
        )
    for tensor in wanted:
        _check_shape(file, tensor)
    return wanted


def biased(file: GgufFile, linears: tuple[str, ...]) -> list[str]:
    """Of these linears, those with a bias in any layer; then it has to be in all of them."""
    names = {name.split(".", 2)[-1] for name in file.tensors if name.startswith("blk.")}
    return [linear for linear in linears if f"{linear}.bias" in names]


def _outer(file: GgufFile, sizes: Sizes) -> Iterator[Wanted]:
    table = (sizes.vocabulary, sizes.hidden)
    yield Wanted(name="model.embed_tokens.weight", source="token_embd.weight", shape=table)
    yield Wanted(name="model.norm.weight", source="output_norm.weight", shape=(sizes.hidden,))
    if "output.weight" in file.tensors:
        yield Wanted(name="lm_head.weight", source="output.weight", shape=table)


def _layers(file: GgufFile, sizes: Sizes) -> Iterator[Wanted]:
    heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads}
    shapes = _weights(sizes) | _biases(file, sizes)
    # Hugging Face's attention has four biases or none: those that a file leaves out are zeros.
    present = {f"{linear}.bias" for linear in biased(file, (*ATTENTION, *MLP))}
    for index in range(sizes.layers):
        for theirs, shape in shapes.items():
            module, _, kind = theirs.partition(".")
            made_up = kind == "bias" and theirs not in present
            yield Wanted(
                name=f"model.layers.{index}.{_NAMES[module]}.{kind}",
                source=None if made_up else f"blk.{index}.{theirs}",
                shape=shape,
                heads=heads.get(module, 0),
            )


def _weights(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of one layer, by GGUF's names without the layer's."""
    hidden, q, kv = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q, hidden),
        "attn_k.weight": (kv, hidden),
        "attn_v.weight": (kv, hidden),
        "attn_output.weight": (hidden, q),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (sizes.mlp, hidden),
        "ffn_up.weight": (sizes.mlp, hidden),
        "ffn_down.weight": (hidden, sizes.mlp),
    }


def _biases(file: GgufFile, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    weights = _weights(sizes)
    linears = [part for group in (ATTENTION, MLP) if biased(file, group) for part in group]
    return {f"{linear}.bias": weights[f"{linear}.weight"][:1] for linear in linears}


def _check_shape(file: GgufFile, tensor: Wanted) -> None:
    if tensor.source is None:
        return
    found = file.tensors[tensor.source].shape
    if found == tensor.shape:
        return
    if tensor.source == "token_embd.weight" and found[1:] == tensor.shape[1:]:
        raise ModelCorrupt(
            f"{file.path}: the vocabulary has {tensor.shape[0]} tokens, "
            f"its embedding {found[0]} rows"
        )
    raise ModelCorrupt(f"{file.path}: tensor {tensor.source} has shape {found}, not {tensor.shape}")


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
