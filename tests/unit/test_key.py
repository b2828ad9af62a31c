"""Graph keys: every factor matters, nothing else does, and bad factors are named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from precast.errors import UnsupportedSpec
from precast.graphs.capture import compiler
from precast.graphs.key import (
    KEY_LENGTH,
    SPEC_NAMES,
    SpecFactors,
    build_digest,
    explain,
    graph_key,
    is_key,
    key_of_factors,
    nearest,
    parse_spec,
    spec_digest,
    spec_part,
    spec_to_wire,
)
from tests.support.compile_worker import BUILD, FACTORS, ROOT
from tests.support.models import write_model

OTHER_VALUES = {
    "architecture": "qwen2",
    "hidden_size": "1024",
    "query_groups": "3,2",
    "head_dim": "128",
    "intermediate_size": "512",
    "vocab_size": "24576",
    "vocab_widths": "24576,24576",
    "rms_norm_eps": "1e-06",
    "options": '{"attention_bias":true}',
    "tp_size": "2",
    "weight_dtype": "bf16",
    "quantization": "none",
    "head_quantization": "q8_0",
    "packing_version": "3",
    "num_tokens": "2",
    "block_size": "16",
    "kv_dtype": "bf16",
    "provider": "onednn",
    "provider_abi": "3",
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


def other_compiler(patch: pytest.MonkeyPatch, folder: Path) -> None:
    compiler = folder / "g++"
    compiler.write_text("#!/bin/sh\necho 99.1\n")
    compiler.chmod(0o700)
    patch.setenv("CXX", str(compiler))


def other_flags(patch: pytest.MonkeyPatch, folder: Path) -> None:
    options = compiler.inductor_options
    patch.setattr(compiler, "inductor_options", lambda isa: {**options(isa), "cpp.threads": 2})


OTHER_BUILDS = {"compiler": other_compiler, "flags": other_flags}


def test_every_build_factor_has_a_sensitivity_test() -> None:
    assert set(OTHER_BUILDS) == set(compiler.build_factors())
    assert not set(OTHER_BUILDS) & SPEC_NAMES


@pytest.mark.parametrize("name", sorted(OTHER_BUILDS))
def test_build_factor_changes_the_key(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = compiler.build_factors()
    OTHER_BUILDS[name](monkeypatch, tmp_path)
    other = compiler.build_factors()
    assert list(explain(build, other)) == [name]
    assert graph_key(FACTORS, other) != graph_key(FACTORS, build)
    assert build_digest(other) != build_digest(build)


KEY_OF_A_RANK = """
import os, platform, socket, sys, time

host = sys.argv[3]
socket.gethostname = platform.node = lambda: host
os.uname = lambda: os.uname_result(("Linux", host, "9", "9", "x86_64"))
clock = time.time
time.time = lambda: clock() + float(sys.argv[4])

import torch
from pathlib import Path
from precast.graphs.capture.compiler import build_factors
from precast.graphs.factors import rank_factors
from precast.graphs.key import graph_key
from precast.models.config import load_config
from precast.models.precision import Precision
from precast.models.shape import shape_of
from precast.models.sharding import shard

config = load_config(Path(sys.argv[1]))
precision = Precision(quantization="int8")
shape = shape_of(config, shard(config, int(sys.argv[2]), 2), precision)
factors = rank_factors(shape, block_size=32, torch_version=str(torch.__version__))
print(graph_key({**factors, "num_tokens": "4"}, build_factors()))
"""


def test_nothing_of_host_path_rank_or_time_is_in_a_key(tmp_path: Path) -> None:
    def key(place: str, rank: int, host: str, later_s: float) -> str:
        """The key that a rank of another machine, with everything at another place, comes to."""
        base = tmp_path / place
        shutil.copytree(ROOT / "precast", base / "precast", ignore=shutil.ignore_patterns("*.pyc"))
        model = write_model(base / "models" / place, vocab_size=288)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PRECAST_")},
            "PYTHONPATH": str(base),
            "HOME": str(base),
            "TMPDIR": str(base),
            "HOSTNAME": host,
        }
        done = subprocess.run(
            [sys.executable, "-c", KEY_OF_A_RANK, model, str(rank), host, str(later_s)],
            cwd=base,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert key("here", 0, "one", 0.0) == key("elsewhere", 1, "two", 86_400.0) != ""


def test_nearest_differs_in_the_fewest_factors() -> None:
    others = {
        "far": {"a": "9", "b": "9", "c": "3"},
        "near": {"a": "1", "b": "9", "c": "3"},
        "also": {"a": "1", "b": "2", "c": "9"},
    }
    wanted = {"a": "1", "b": "2", "c": "3"}
    assert nearest(wanted, others, 2) == [("also", {"c": ("3", "9")}), ("near", {"b": ("2", "9")})]
    assert nearest(wanted, {}, 2) == []


def test_key_is_stable_and_ignores_order() -> None:
    backwards = dict(reversed(list(FACTORS.items())))
    assert graph_key(backwards, BUILD) == graph_key(FACTORS, BUILD)
    # written down: a change of the key's definition must be noticed, for it empties every cache
    assert graph_key(FACTORS, BUILD) == "25e0b7680b8e26b133ff0ac9d4164956"


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
        ("num_tokens", "0"),
        ("num_tokens", "-1"),
        ("num_tokens", "08"),
        ("num_tokens", "1.0"),
        ("num_tokens", "1e3"),
        ("num_tokens", "9" * 300),
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
        ("query_groups", "03,3"),
        ("query_groups", "3,00"),
        ("query_groups", "99999999999"),
        ("vocab_widths", "1," * 400 + "1"),
        ("options", "x"),
        ("options", '{"a": 1}'),
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
