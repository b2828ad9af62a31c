"""What a captured graph depends on, by name, and the key that follows from it.

A graph is a pure function of shapes, data types, kernels and tool chain; never of weights, ranks,
hosts, ports, paths or time. What the worker that runs it knows are the *spec factors*; what the
compile worker adds are the *build factors*. The key is a digest of both, so the same inputs give
the same key on every machine, and a miss can be explained by naming the factors that differ.

A new spec factor is a new field of ``SpecFactors``, and nothing else.
"""

from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from blake3 import blake3

from precast.errors import InvalidRequest, UnsupportedSpec
from precast.models.precision import KvDtype, Quantization, WeightDtype

KEY_LENGTH: Final = 32
MAX_FACTOR_LENGTH: Final = 512

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+,:-]{0,127}\Z")]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_COUNT: Final = "(0|[1-9][0-9]{0,9})"
Counts = Annotated[
    str, msgspec.Meta(pattern=rf"^{_COUNT}(,{_COUNT})*\Z", max_length=MAX_FACTOR_LENGTH)
]
OptionsText = Annotated[
    str, msgspec.Meta(pattern=r"^\{[A-Za-z0-9_.,:\"\[\]+-]*\}\Z", max_length=MAX_FACTOR_LENGTH)
]
Positive = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0e12)]

Differences = dict[str, tuple[str | None, str | None]]
"""Factors in which two graphs differ, by name: the one's value and the other's."""


class SpecFactors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The factors that a decode worker knows. Sizes are those of one rank's shard."""

    architecture: Name
    """Model family as the graph source knows it: "llama"."""
    hidden_size: Count
    query_groups: Counts
    """For each key/value head of this shard, its query heads; "0": the shard has none."""
    head_dim: Count
    intermediate_size: Count
    """MLP columns of this shard."""
    vocab_size: Count
    """Vocabulary rows of this shard."""
    vocab_widths: Counts
    """Vocabulary rows of every rank's shard; every rank embeds all of them."""
    rms_norm_eps: Positive
    options: OptionsText
    """What only this architecture has, as JSON: biases, windows, kinds of layers, experts."""
    tp_size: Count
    """Ranks that take part in an all-reduce. Which rank this is makes no difference."""
    weight_dtype: WeightDtype
    quantization: Quantization
    """Format of the layers' linears; "none": that of ``weight_dtype``."""
    head_quantization: Quantization
    """Format of the output projection."""
    packing_version: Name
    """Layout of packed weights that the kernels expect."""
    num_tokens: Count
    """Tokens of a step: one each of decoding sequences, more of a prompt."""
    block_size: Count
    """Tokens in one block of the KV cache."""
    kv_dtype: KvDtype
    provider: Name
    """Kernel provider behind the operators."""
    provider_abi: Name
    torch: Name
    isa: Name
    """Instruction set that the code is compiled for."""
    graph_source: Name
    """Digest of the sources that define the traced computation."""


SPEC_NAMES: Final = frozenset(field.name for field in msgspec.structs.fields(SpecFactors))


def parse_spec(factors: Mapping[str, str]) -> SpecFactors:
    """Check factors from the wire: all names known, none missing, values bounded and canonical.

    Raises:
        UnsupportedSpec: naming the first factor that is wrong.
    """
    _check_lengths(factors)
    try:
        spec = msgspec.convert(dict(factors), SpecFactors, strict=False)
    except msgspec.ValidationError as error:
        raise UnsupportedSpec(f"graph factors: {error}") from None
    for name, value in spec_to_wire(spec).items():
        # "8", "08" and "8.0" would be one graph under three keys.
        if factors[name] != value:
            raise UnsupportedSpec(f"graph factor {name}: write {factors[name]!r} as {value!r}")
    return spec


def spec_to_wire(spec: SpecFactors) -> dict[str, str]:
    """The factors by name, as they travel and as they enter the key."""
    return {name: str(value) for name, value in msgspec.structs.asdict(spec).items()}


def spec_part(factors: Mapping[str, str]) -> dict[str, str]:
    """The spec factors out of an artifact's factors (spec and build together)."""
    return {name: value for name, value in factors.items() if name in SPEC_NAMES}


def spec_digest(factors: Mapping[str, str]) -> str:
    """Names what a worker asks for, whoever compiled it."""
    return _digest({"spec": dict(factors)})


def build_digest(build: Mapping[str, str]) -> str:
    """Names a tool chain: compile workers with the same one can do each other's work."""
    return _digest({"build": dict(build)})


def graph_key(spec: Mapping[str, str], build: Mapping[str, str]) -> str:
    """The graph's content address: 32 hex digits over spec and build factors."""
    clash = sorted(set(build) & SPEC_NAMES)
    if clash:
        raise ValueError(f"build factors must not reuse the names of spec factors: {clash}")
    return _digest({"spec": dict(spec), "build": dict(build)})


def key_of_factors(factors: Mapping[str, str]) -> str:
    """The key of an artifact from all its factors."""
    spec = spec_part(factors)
    return graph_key(spec, {name: value for name, value in factors.items() if name not in spec})


def explain(a: Mapping[str, str], b: Mapping[str, str]) -> Differences:
    """The factors in which two graphs differ: name -> (value in a, value in b); None where
    absent."""
    names = sorted(set(a) | set(b))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def nearest(
    wanted: Mapping[str, str], others: Mapping[str, Mapping[str, str]], limit: int
) -> list[tuple[str, Differences]]:
    """Of graphs' factors by key: the keys that differ from ``wanted`` in the fewest factors, and
    how (value wanted, value there)."""
    differences = {key: explain(wanted, factors) for key, factors in others.items()}
    return sorted(differences.items(), key=lambda item: (len(item[1]), item[0]))[:limit]


def is_key(text: str) -> bool:
    """Whether ``text`` has the form of a key. Anything else must never become part of a path."""
    return len(text) == KEY_LENGTH and all(c in "0123456789abcdef" for c in text)


def check_key(text: str) -> None:
    """Raises ``InvalidRequest`` for what hasn't the form of a key."""
    if not is_key(text):
        raise InvalidRequest(f"{text[:64]!r} is no graph key ({KEY_LENGTH} hex digits)")


def _digest(value: dict[str, dict[str, str]]) -> str:
    canonical = msgspec.json.encode(value, order="deterministic")
    return blake3(canonical).hexdigest()[:KEY_LENGTH]


def _check_lengths(factors: Mapping[str, str]) -> None:
    for name, value in factors.items():
        if len(name) > MAX_FACTOR_LENGTH or len(value) > MAX_FACTOR_LENGTH:
            raise UnsupportedSpec(f"graph factor {name[:40]!r} is too long")
