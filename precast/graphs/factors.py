"""From a rank's shapes to graph factors and back.

A decode worker says what it needs as factors; the compile worker builds the same shapes from them.
The two directions stand side by side so that they can't drift apart.
"""

from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec

from precast.errors import InvalidRequest
from precast.models.layers import Shape
from precast.models.options import (
    GptOssOptions,
    Options,
    check_architecture,
    experts_of,
    from_factor,
    to_factor,
)
from precast.models.shape import MAX_ADAPTER_RANK, AdapterShape, AdapterTarget, ModelShape
from precast.ops import providers
from precast.ops.native import MAX_QUERY_GROUP, PACKING_VERSION, native_isa

_PACKAGE = Path(__file__).parents[1]
_GRAPH_SOURCES = (
    "models/layers.py",
    "models/weights/adapters.py",
    "models/kv_cache.py",
    "models/weights/loader.py",
    "models/shape.py",
    "models/options.py",
    "ops/native.py",
    "ops/providers/reference.py",
    "graphs/targets.py",
    "graphs/capture/build.py",
    "graphs/capture/codegen.py",
    "graphs/capture/compiler.py",
    "graphs/capture/export.py",
)
"""Beside the architecture's own module."""

ISA_LEVELS = {
    "scalar": "x86-64-v2",
    "avx2": "x86-64-v3",
    "avxvnni": "x86-64-v3",
    "avx512": "x86-64-v4",
    "amx": "x86-64-v4",
}
"""Target of a graph's own code for each instruction set of the native kernels."""


def rank_factors(shape: Shape, *, block_size: int, torch_version: str) -> dict[str, str]:
    """A rank's spec factors but for the number of tokens."""
    return {
        "architecture": shape.architecture,
        "hidden_size": str(shape.hidden_size),
        "query_groups": ",".join(map(str, shape.query_groups)) or "0",
        "head_dim": str(shape.head_dim),
        "intermediate_size": str(shape.intermediate_size),
        "vocab_size": str(shape.vocab_size),
        "vocab_widths": ",".join(map(str, shape.vocab_widths)),
        "rms_norm_eps": repr(shape.rms_norm_eps),
        "options": _options(shape),
        "tp_size": str(shape.tp_size),
        "weight_dtype": shape.weight_dtype,
        "quantization": shape.quantization,
        "head_quantization": shape.head_quantization,
        "packing_version": str(PACKING_VERSION),
        "block_size": str(block_size),
        "kv_dtype": shape.kv_dtype,
        "provider": providers.active().provider,
        "provider_abi": providers.active().abi,
        "torch": torch_version,
        "isa": ISA_LEVELS[native_isa()],
        "graph_source": graph_source(shape.architecture),
    }


def needs_of(shape: Shape) -> providers.Needs:
    """What the shape asks of a kernel provider."""
    return providers.Needs(
        weight_dtype=shape.weight_dtype,
        formats=frozenset({shape.linear_format, shape.head_format}),
        kv_dtype=shape.kv_dtype,
        head_dim=shape.head_dim,
        uneven_groups=len(set(shape.query_groups)) > 1,
        experts=experts_of(shape.options),
        limited_experts=isinstance(shape.options, GptOssOptions),
    )


def start_provider(factors: Mapping[str, str]) -> None:
    """Makes this process use the provider that the factors name, as far as it can.
    ``check_versions`` says whether that is what they mean. Raises InvalidRequest."""
    if factors["provider"] not in providers.PROVIDERS:
        raise InvalidRequest(f"provider {factors['provider']} is none that is known here")
    providers.start(providers.select(factors["provider"], needs_of(shape_from(factors))))


def check_versions(factors: Mapping[str, str]) -> None:
    """Refuses factors of another installation: the graph would not be what its key says.

    Raises InvalidRequest.
    """
    check_architecture(factors["architecture"])
    ours = {
        "packing_version": str(PACKING_VERSION),
        "provider": providers.active().provider,
        "provider_abi": providers.active().abi,
        "torch": version("torch"),
        "graph_source": graph_source(factors["architecture"]),
    }
    for name, value in ours.items():
        if factors[name] != value:
            raise InvalidRequest(f"{name} is {factors[name]}, but {value} is installed here")


def shape_from(factors: Mapping[str, str]) -> Shape:
    """The shape that the factors describe. Raises InvalidRequest if they contradict each other."""
    widths = tuple(int(w) for w in factors["vocab_widths"].split(","))
    options, adapters = _read_options(factors["architecture"], factors["options"])
    shape = ModelShape(
        vocab_widths=widths,
        rms_norm_eps=float(factors["rms_norm_eps"]),
        options=options,
        adapters=adapters,
        architecture=factors["architecture"],
        hidden_size=int(factors["hidden_size"]),
        query_groups=_groups(factors["query_groups"]),
        head_dim=int(factors["head_dim"]),
        intermediate_size=int(factors["intermediate_size"]),
        vocab_size=int(factors["vocab_size"]),
        weight_dtype=factors["weight_dtype"],
        quantization=factors["quantization"],
        head_quantization=factors["head_quantization"],
        kv_dtype=factors["kv_dtype"],
    )
    if shape.vocab_size not in widths:
        raise InvalidRequest("vocab_size is none of vocab_widths")
    if len(widths) != int(factors["tp_size"]):
        raise InvalidRequest("vocab_widths must have one entry for each of tp_size ranks")
    return shape


class _Adapters(msgspec.Struct, frozen=True, kw_only=True):
    """Beside an architecture's options, in the same factor: graphs without adapters have none."""

    adapter_rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_ADAPTER_RANK)]
    adapter_targets: tuple[AdapterTarget, ...]


def _options(shape: Shape) -> str:
    text = to_factor(shape.options)
    if shape.adapters is None:
        return text
    own = _Adapters(adapter_rank=shape.adapters.rank, adapter_targets=shape.adapters.targets)
    both = msgspec.json.decode(text) | msgspec.to_builtins(own)
    return msgspec.json.encode(both, order="sorted").decode()


def _read_options(architecture: str, text: str) -> tuple[Options, AdapterShape | None]:
    """The two parts of what ``_options`` has written. Raises InvalidRequest."""
    check_architecture(architecture)
    try:
        both = msgspec.json.decode(text, type=dict[str, Any])
        own = {name: both.pop(name) for name in list(both) if name.startswith("adapter_")}
        rest = msgspec.json.encode(both, order="sorted").decode() if own else text
        options = from_factor(architecture, rest)
        if not own:
            return options, None
        found = msgspec.convert(own, _Adapters)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"options {text}: {error}") from None
    targets = found.adapter_targets
    if not targets or tuple(sorted(set(targets))) != targets:
        raise InvalidRequest(f"options {text}: adapter_targets: sorted, and at least one")
    return options, AdapterShape(rank=found.adapter_rank, targets=targets)


def _groups(text: str) -> tuple[int, ...]:
    groups = tuple(int(size) for size in text.split(",")) if text != "0" else ()
    if not all(1 <= size <= MAX_QUERY_GROUP for size in groups):
        raise InvalidRequest(f"query_groups: a KV head has 1 to {MAX_QUERY_GROUP} query heads")
    return groups


@cache
def graph_source(architecture: str) -> str:
    """Digest of the sources that decide what a captured graph computes and how it is called."""
    digest = blake2b(digest_size=8)
    for name in (*_GRAPH_SOURCES, f"models/{architecture}.py"):
        digest.update(name.encode() + b"\0" + (_PACKAGE / name).read_bytes() + b"\0")
    return digest.hexdigest()
