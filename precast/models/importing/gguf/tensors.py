"""A model's tensors, each by both of its names.

Every tensor that the model has must be in the file, and every one in the file must be the model's:
nothing is made up, and nothing dropped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.metadata import Sizes
from precast.models.importing.gguf.rope import FREQUENCIES

ATTENTION: Final = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP: Final = ("ffn_gate", "ffn_up", "ffn_down")
NAMES: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
"""Of a layer's modules, in most architectures."""
_EXPERTS: Final = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One tensor of the Hugging Face folder and where it comes from."""

    name: str
    source: str | None
    """The file's tensor; None: zeros."""
    shape: tuple[int, ...]
    heads: int = 0
    """Rows are this many heads whose halves GGUF interleaves; 0: rows stay where they are."""
    first_row: int = 0
    """Of the file's tensor, where it has several of ours."""
    of: int = 0
    """How many of ours it has; 0: one, of the same shape."""
    less_one: bool = False
    """Whether the file has 1 more."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What sets an architecture's tensors apart."""

    names: Mapping[str, str]
    """GGUF's modules of a layer to Hugging Face's."""
    interleaved: bool = False
    """Whether the file has rows of queries and keys as neighbours that are rotated together."""
    norms_plus_one: bool = False
    all_biased: bool = True
    """Whether attention has four biases or none: those that a file leaves out are zeros."""


def wanted_tensors(file: GgufFile, sizes: Sizes, layout: Layout) -> list[Wanted]:
    """All of the folder's tensors. Raises where the file has others, more, or fewer."""
    wanted = [*_outer(file, sizes, layout), *_layers(file, sizes, layout)]
    missing = [t.source for t in wanted if t.source and t.source not in file.tensors]
    if missing:
        raise ModelCorrupt(
            f"{file.path}: tensor {missing[0]} is missing{_and_more(len(missing))}; "
            f"it has {len(file.tensors)} tensors"
        )
    unused = sorted(set(file.tensors) - {t.source for t in wanted} - {FREQUENCIES})
    if unused:
        raise UnsupportedArchitecture(
            f"{file.path}: tensor {unused[0]!a} is not one of a "
            f"{file.text('general.architecture')} model's{_and_more(len(unused))}"
        )
    for tensor in wanted:
        _check_shape(file, tensor)
    return wanted


def biased(file: GgufFile, linears: tuple[str, ...]) -> list[str]:
    """Of these linears, those with a bias in any layer; then it has to be in all of them."""
    names = {name.split(".", 2)[-1] for name in file.tensors if name.startswith("blk.")}
    return [linear for linear in linears if f"{linear}.bias" in names]


def _outer(file: GgufFile, sizes: Sizes, layout: Layout) -> Iterator[Wanted]:
    table = (sizes.vocabulary, sizes.hidden)
    yield Wanted(name="model.embed_tokens.weight", source="token_embd.weight", shape=table)
    yield Wanted(
        name="model.norm.weight",
        source="output_norm.weight",
        shape=(sizes.hidden,),
        less_one=layout.norms_plus_one,
    )
    if "output.weight" in file.tensors:
        yield Wanted(name="lm_head.weight", source="output.weight", shape=table)


def _layers(file: GgufFile, sizes: Sizes, layout: Layout) -> Iterator[Wanted]:
    heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads} if layout.interleaved else {}
    shapes = _shapes(sizes, fused="ffn_gate" not in layout.names)
    wanted = {f"{name}.weight": shapes[name] for name in layout.names}
    groups = (group for group in (ATTENTION, MLP) if biased(file, group))
    linears = [
        part for group in groups for part in (group if layout.all_biased else biased(file, group))
    ]
    wanted |= {f"{name}.bias": shapes[name][:1] for name in linears if name in layout.names}
    present = {f"{linear}.bias" for linear in biased(file, (*ATTENTION, *MLP))}
    for index in range(sizes.layers):
        prefix = f"model.layers.{index}."
        for theirs, shape in wanted.items():
            module, _, kind = theirs.partition(".")
            made_up = kind == "bias" and theirs not in present
            yield Wanted(
                name=f"{prefix}{layout.names[module]}.{kind}",
                source=None if made_up else f"blk.{index}.{theirs}",
                shape=shape,
                heads=heads.get(module, 0),
                less_one=layout.norms_plus_one and module.endswith("norm"),
            )
        if sizes.experts:
            yield from _experts(sizes, prefix, f"blk.{index}.")


def _experts(sizes: Sizes, ours: str, theirs: str) -> Iterator[Wanted]:
    for module, name in _EXPERTS.items():
        shape = (sizes.expert_mlp, sizes.hidden)
        shape = shape[::-1] if module == "ffn_down_exps" else shape
        for expert in range(sizes.experts):
            yield Wanted(
                name=f"{ours}mlp.experts.{expert}.{name}.weight",
                source=f"{theirs}{module}.weight",
                shape=shape,
                first_row=expert * shape[0],
                of=sizes.experts,
            )


def _shapes(sizes: Sizes, *, fused: bool) -> dict[str, tuple[int, ...]]:
    """Of one layer's weights, by GGUF's modules; ``fused``: whether gate and up are one."""
    hidden, q, kv = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    return {
        **dict.fromkeys(norms, (hidden,)),
        "attn_q_norm": (sizes.head_dim,),
        "attn_k_norm": (sizes.head_dim,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_qkv": (q + 2 * kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (sizes.mlp, hidden),
        "ffn_up": (2 * sizes.mlp if fused else sizes.mlp, hidden),
        "ffn_down": (hidden, sizes.mlp),
        "ffn_gate_inp": (sizes.experts, hidden),
    }


def _check_shape(file: GgufFile, tensor: Wanted) -> None:
    if tensor.source is None:
        return
    found = file.tensors[tensor.source].shape
    expected = (tensor.of, *tensor.shape) if tensor.of else tensor.shape
    if found != expected:
        raise ModelCorrupt(f"{file.path}: tensor {tensor.source} has shape {found}, not {expected}")


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
