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
from precast.models.importing.gguf.rope import FREQUENCIES, LONG_FACTORS, SHORT_FACTORS

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
EXPERTS: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_SINKS: Final = "attn_sinks"
_SHARED_GATE: Final = "ffn_gate_inp_shexp"
_NOT_OF_LAYERS: Final = (FREQUENCIES, LONG_FACTORS, SHORT_FACTORS)
"""What the rope is read from."""


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
    stored: tuple[int, ...] = ()
    """Shape of the file's tensor; empty: the same."""
    odd: str | None = None
    """Every second output comes from this one, and the first of them from ``source``."""
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
    long_norms: bool = False
    """Whether norms of queries and keys are over all heads."""
    experts: tuple[str, str, str, str] | None = None
    """Before an expert's number, and its gate, up and down."""
    stacked: str = ""
    """Before the tensors that have all experts, with gate and up in one, and biases."""


def wanted_tensors(file: GgufFile, sizes: Sizes, layout: Layout) -> list[Wanted]:
    """All of the folder's tensors. Raises where the file has others, more, or fewer."""
    wanted = [*_outer(file, sizes, layout), *_layers(file, sizes, layout)]
    sources = (name for tensor in wanted for name in (tensor.source, tensor.odd) if name)
    missing = [name for name in sources if name not in file.tensors]
    if missing:
        raise ModelCorrupt(
            f"{file.path}: tensor {missing[0]} is missing{_and_more(len(missing))}; "
            f"it has {len(file.tensors)} tensors"
        )
    used = {name for tensor in wanted for name in (tensor.source, tensor.odd)}
    unused = sorted(set(file.tensors) - used - set(_NOT_OF_LAYERS))
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
    shapes = _shapes(sizes, layout)
    wanted = {f"{name}.weight": shapes[name] for name in layout.names} | _biases(
        file, layout, shapes
    )
    present = {name.split(".", 2)[-1] for name in file.tensors if name.startswith("blk.")}
    for index in range(sizes.layers):
        prefix = f"model.layers.{index}."
        for theirs, shape in wanted.items():
            module, _, kind = theirs.partition(".")
            made_up = kind == "bias" and theirs not in present
            ours = layout.names[module]
            yield Wanted(
                name=f"{prefix}{ours}" if module == _SINKS else f"{prefix}{ours}.{kind}",
                source=None if made_up else f"blk.{index}.{theirs}",
                shape=shape,
                stored=shape[1:] if module == _SHARED_GATE else (),
                heads=heads.get(module, 0),
                less_one=layout.norms_plus_one and module.endswith("norm"),
            )
        if layout.experts:
            yield from _experts(file, sizes, layout.experts, prefix, f"blk.{index}.")
        if layout.stacked:
            yield from _stacks(sizes, f"{prefix}{layout.stacked}", f"blk.{index}.")


def _biases(
    file: GgufFile, layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Of a layer's linears."""
    groups = (group for group in (ATTENTION, MLP) if biased(file, group))
    linears = [
        part for group in groups for part in (group if layout.all_biased else biased(file, group))
    ]
    if layout.stacked:
        linears.append("ffn_gate_inp")
    return {f"{name}.bias": shapes[name][:1] for name in linears if name in layout.names}


def _experts(
    file: GgufFile, sizes: Sizes, names: tuple[str, str, str, str], ours: str, theirs: str
) -> Iterator[Wanted]:
    """Each expert's linears are tensors of their own in Hugging Face's folders."""
    prefix, *modules = names
    for module, name in zip(EXPERTS, modules, strict=True):
        source, shape = f"{theirs}{module}.weight", _shape_of_expert(sizes, module)
        stored = (sizes.experts, *shape)
        _check_source(file, source, stored)
        # no more than the file has, whatever it says
        for expert in range(sizes.experts if source in file.tensors else 1):
            yield Wanted(
                name=f"{ours}{prefix}{expert}.{name}.weight",
                source=source,
                shape=shape,
                first_row=expert * shape[0],
                stored=stored,
            )


def _stacks(sizes: Sizes, ours: str, theirs: str) -> Iterator[Wanted]:
    """All experts of a layer are in one tensor, as gpt-oss has them: [experts, inputs, outputs]."""
    gate, up, down = (f"{theirs}{module}" for module in EXPERTS)
    count, size, hidden = sizes.experts, sizes.expert_mlp, sizes.hidden
    both = f"{ours}gate_up_proj"
    for name, kind, shape, stored in (
        (both, "weight", (count, hidden, 2 * size), (count, size, hidden)),
        (f"{both}_bias", "bias", (count, 2 * size), (count, size)),
    ):
        yield Wanted(
            name=name, source=f"{gate}.{kind}", odd=f"{up}.{kind}", shape=shape, stored=stored
        )
    yield Wanted(
        name=f"{ours}down_proj",
        source=f"{down}.weight",
        shape=(count, size, hidden),
        stored=(count, hidden, size),
    )
    yield Wanted(name=f"{ours}down_proj_bias", source=f"{down}.bias", shape=(count, hidden))


def _shape_of_expert(sizes: Sizes, module: str) -> tuple[int, int]:
    down = module == "ffn_down_exps"
    return (sizes.hidden, sizes.expert_mlp) if down else (sizes.expert_mlp, sizes.hidden)


def _shapes(sizes: Sizes, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Of one layer's weights, by GGUF's modules."""
    hidden, q, kv = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    fused = "ffn_gate" not in layout.names
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    return {
        **dict.fromkeys(norms, (hidden,)),
        "attn_q_norm": (q if layout.long_norms else sizes.head_dim,),
        "attn_k_norm": (kv if layout.long_norms else sizes.head_dim,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_qkv": (q + 2 * kv, hidden),
        "attn_output": (hidden, q),
        _SINKS: (sizes.heads,),
        "ffn_gate": (sizes.mlp, hidden),
        "ffn_up": (2 * sizes.mlp if fused else sizes.mlp, hidden),
        "ffn_down": (hidden, sizes.mlp),
        "ffn_gate_inp": (sizes.experts, hidden),
        _SHARED_GATE: (1, hidden),
        "ffn_gate_shexp": (sizes.shared_mlp, hidden),
        "ffn_up_shexp": (sizes.shared_mlp, hidden),
        "ffn_down_shexp": (hidden, sizes.shared_mlp),
    }


def _check_shape(file: GgufFile, tensor: Wanted) -> None:
    for source in (tensor.source, tensor.odd):
        if source is not None:
            _check_source(file, source, tensor.stored or tensor.shape)
    if tensor.odd is None:
        return
    kinds = [file.tensors[name].type.name for name in (tensor.source or "", tensor.odd)]
    if kinds[0] != kinds[1]:
        raise UnsupportedArchitecture(
            f"{file.path}: tensors {tensor.source} and {tensor.odd} are of different types, "
            f"{kinds[0]} and {kinds[1]}"
        )


def _check_source(file: GgufFile, name: str, expected: tuple[int, ...]) -> None:
    """One that is missing is found later."""
    entry = file.tensors.get(name)
    if entry is not None and entry.shape != expected:
        raise ModelCorrupt(f"{file.path}: tensor {name} has shape {entry.shape}, not {expected}")


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
