"""Models over several real ranks say what they say on one, whatever their head counts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from precast.ops.native import native_isa
from precast.system.cpu import narrowed, this_cpu
from tests.support import command
from tests.support.models import tensors, write_model

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.support.tensor_parallel_program"
NO_SUCH = "native (it has no such operator)"
NO_EXPERTS = "native (the model has no experts)"
WITHOUT_UPSTREAM = {
    "embedding": NO_SUCH,
    "fused_experts": NO_EXPERTS,
    "route": NO_EXPERTS,
    "sigmoid_and_mul": NO_SUCH,
    "soft_cap": NO_SUCH,
}


def generate(
    model: Path, *arguments: str, python_path: str | None = None, **environment: str
) -> dict[str, Any]:
    """What each group size answered, step by step; and by "kernels", who served each operator."""
    if python_path is None:
        program = command.run(f"{PROGRAM}:main", model, *arguments, environment=environment)
    else:
        environment = {**os.environ, "PYTHONPATH": python_path, **environment}
        program = subprocess.run(
            [sys.executable, "-m", PROGRAM, str(model), *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=110,
        )
    assert program.returncode == 0, program.stderr[-2000:]
    answers: dict[str, Any] = json.loads(program.stdout.splitlines()[-1])  # logs come first
    return answers


def make_model(folder: Path, **changes: Any) -> Path:
    write_model(folder, **changes)
    save_file(tensors(**changes), folder / "model.safetensors")
    return folder


def assert_same(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for a, b in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
            assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "tps"),
    [(3, 1, "2,3"), (6, 2, "2,3,4"), (5, 5, "2,3,4"), (4, 2, "8"), (9, 3, "2,4")],
)
def test_any_number_of_ranks_agrees_with_one(
    tmp_path: Path, q_heads: int, kv_heads: int, tps: str
) -> None:
    """The last has more ranks than query heads: some ranks have no attention."""
    model = make_model(
        tmp_path / "awkward",
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        intermediate_size=88,
        attention_bias=True,
    )
    answers = generate(model, f"--tp=1,{tps}")
    assert len({token for step in answers["1"] for token in step["tokens"]}) > 3
    for tp in tps.split(","):
        assert_same(answers[tp], answers["1"])


@pytest.mark.parametrize(
    "precision",
    [
        (),
        ("--weight-dtype=bf16", "--kv-dtype=bf16"),
        ("--quantization=int8", "--kv-dtype=int8"),
        ("--quantization=q4_1",),
    ],
)
def test_the_reference_provider_gives_the_same(tmp_path: Path, precision: tuple[str, ...]) -> None:
    model = make_model(tmp_path / "model")
    native = generate(model, "--tp=1", *precision)
    reference = generate(model, "--tp=1", "--provider=reference", *precision)
    assert set(native["kernels"].values()) == {"native"}
    assert set(reference["kernels"].values()) == {"reference"}
    # Roundings to 8 bits may fall the other way, and this model's rows are short.
    tolerance = 6e-2 if precision else 2e-4
    for ours, theirs in zip(native["1"], reference["1"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for a, b in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
            assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.parametrize("isa", ["avx2", native_isa()])
def test_a_provider_serves_what_it_can_in_a_rank(tmp_path: Path, isa: str) -> None:
    """Upstream's operators (a stand-in) where the CPU allows; a reason where not."""
    cpu = narrowed(this_cpu(), isa)
    model = make_model(tmp_path / "model", head_dim=32)
    types = ("--tp=2", "--weight-dtype=bf16", "--kv-dtype=bf16")
    path = f"{ROOT}:{ROOT / 'tests/support/upstream'}"
    native = generate(model, *types, PRECAST_NATIVE_ISA=isa)
    upstream = generate(
        model, *types, "--provider=sgl_kernel", python_path=path, PRECAST_NATIVE_ISA=isa
    )
    assert set(upstream["kernels"]) > set(WITHOUT_UPSTREAM)
    for name, kernel in upstream["kernels"].items():
        if name in WITHOUT_UPSTREAM:
            assert kernel == WITHOUT_UPSTREAM[name]
        elif name == "linear" and not cpu.amx:
            assert kernel == "native (this CPU has no AMX)"
        else:
            assert kernel == "sgl_kernel"
    first, same = upstream["2"][0], native["2"][0]
    for a, b in zip(first["top_logprobs"], same["top_logprobs"], strict=True):
        assert a == pytest.approx(b, abs=0.1)  # activations in bf16
