"""Models over several real ranks say what they say on one, whatever their head counts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from tests.support.models import tensors, write_model

ROOT = Path(__file__).parents[2]


def generate(model: Path, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    """What each group size answered, step by step."""
    program = subprocess.run(
        [sys.executable, "-m", "tests.support.tensor_parallel_program", str(model), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert program.returncode == 0, program.stderr[-2000:]
    answers: dict[str, list[dict[str, Any]]] = json.loads(program.stdout)
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
    ("q_heads", "kv_heads", "tps"), [(3, 1, "2,3"), (6, 2, "2,3,4"), (5, 5, "2,3,4"), (4, 2, "8")]
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
