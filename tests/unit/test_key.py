"""Graph keys: every factor matters, nothing else does, and bad factors are named."""

import msgspec
import pytest

from precast.errors import UnsupportedSpec
from precast.graphs.key import (
    KEY_LENGTH,
    SPEC_NAMES,
    SpecFactors,
    build_digest,
    explain,
    graph_key,
    is_key,
    key_of_factors,
    parse_spec,
    spec_digest,
    spec_part,
    spec_to_wire,
)
from tests.support.compile_worker import BUILD, FACTORS

OTHER_VALUES = {
    "architecture": "qwen2",
    "hidden_size": "1024",
    "q_heads": "6",
    "kv_heads": "1",
    "head_dim": "128",
    "intermediate_size": "512",
    "vocab_size": "24576",
    "vocab_widths": "24576,24576",
    "rms_norm_eps": "1e-06",
    "attention_bias": "true",
    "mlp_bias": "true",
    "tp_size": "2",
    "weight_dtype": "bf16",
    "quantization": "none",
    "packing_version": "2",
    "phase": "prefill",
    "batch_size": "2",
    "block_size": "16",
    "kv_dtype": "bf16",
    "provider": "onednn",
    "provider_abi": "2",
    "torch": "2.14.0+cpu",
    "isa": "x86-64-v4",
    "graph_source": "fedcba9876543210",
}


def test_every_factor_has_a_sensitivity_test() -> None:
    assert set(OTHER_VALUES) == SPEC_NAMES == set(FACTORS)


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_spec_factor_changes_the_key(name: str) -> None:
    other = {**FACTORS, name: OTHER_VALUES[name]}
    parse_spec(other)
    assert graph_key(other, BUILD) != graph_key(FACTORS, BUILD)
    assert spec_digest(other) != spec_digest(FACTORS)
    assert explain(FACTORS, other) == {name: (FACTORS[name], OTHER_VALUES[name])}


@pytest.mark.parametrize("name", sorted(BUILD))
def test_build_factor_changes_the_key(name: str) -> None:
    other = {**BUILD, name: "something else"}
    assert graph_key(FACTORS, other) != graph_key(FACTORS, BUILD)
    assert build_digest(other) != build_digest(BUILD)


def test_key_is_stable_and_ignores_order() -> None:
    backwards = dict(reversed(list(FACTORS.items())))
    assert graph_key(backwards, BUILD) == graph_key(FACTORS, BUILD)
    # written down: a change of the key's definition must be noticed, for it empties every cache
    assert graph_key(FACTORS, BUILD) == "702334ff1d2f9aaa1cdc4d883155e51c"


def test_key_follows_from_an_artifacts_factors() -> None:
    together = {**BUILD, **FACTORS}
    assert key_of_factors(together) == graph_key(FACTORS, BUILD)
    assert spec_part(together) == FACTORS


def test_build_factors_can_not_shadow_spec_factors() -> None:
    with pytest.raises(ValueError, match="torch"):
        graph_key(FACTORS, {"torch": "3"})


def test_explain_names_absent_factors() -> None:
    assert explain({"a": "1"}, {"b": "2"}) == {"a": ("1", None), "b": (None, "2")}


def test_wire_form_round_trips() -> None:
    assert spec_to_wire(parse_spec(FACTORS)) == FACTORS


def test_every_factor_is_required() -> None:
    for name in msgspec.structs.fields(SpecFactors):
        without = {key: value for key, value in FACTORS.items() if key != name.name}
        with pytest.raises(UnsupportedSpec, match=name.name):
            parse_spec(without)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "0"),
        ("batch_size", "-1"),
        ("batch_size", "08"),
        ("batch_size", "1.0"),
        ("batch_size", "1e3"),
        ("batch_size", "9" * 300),
        ("hidden_size", ""),
        ("hidden_size", "576 "),
        ("rms_norm_eps", "nan"),
        ("rms_norm_eps", "inf"),
        ("rms_norm_eps", "0.00001"),
        ("rms_norm_eps", "-1e-05"),
        ("isa", "../../etc"),
        ("isa", "x86-64-v3\n"),
        ("torch", "2.13.0 --evil"),
        ("vocab_widths", "1,,2"),
        ("vocab_widths", "1," * 400 + "1"),
        ("mlp_bias", "True"),
        ("architecture", "l" * 600),
        ("graph_source", "\x00"),
        ("host", "node-1"),
    ],
)
def test_bad_factors_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UnsupportedSpec, match=name):
        parse_spec({**FACTORS, name: value})


@pytest.mark.parametrize(
    "text", ["", "..", "a" * 31, "A" * 32, "g" * 32, "a" * 33, "../" + "a" * 29, "a" * 31 + "\n"]
)
def test_only_keys_are_keys(text: str) -> None:
    assert not is_key(text)
    assert is_key("0" * KEY_LENGTH)
