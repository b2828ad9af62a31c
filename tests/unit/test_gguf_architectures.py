"""A GGUF file gives the logits of the Hugging Face folder that its weights are from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import (
    Gemma3TextConfig,
    GptOssConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from precast.models.importing.catalog import check_model
from precast.models.importing.gguf.architectures import ARCHITECTURES
from precast.models.importing.gguf.convert import convert
from precast.models.precision import Precision
from precast.ops import native
from tests.support import gguf_models
from tests.support.architectures import CONFIGS, ROPE, SIZES, WINDOW, forward, load, write_model
from tests.support.gguf_files import write_blocks

SAME = (
    "llama",
    "llama_biases",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "phi3_partial",
    "phi3_long",
    "phi3_short",
    "exaone4",
    "exaone4_window",
    "glm4",
    "granite",
    "mixtral",
    "olmo2",
)
"""Of ``CONFIGS``; those whose file says all that their folder does."""
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
OWN: dict[str, Callable[[], Any]] = {
    "qwen3_moe_all": lambda: Qwen3MoeConfig(
        **SIZES,
        rope_parameters=ROPE,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    ),
    "qwen2_moe_all": lambda: Qwen2MoeConfig(
        **SIZES,
        rope_parameters=ROPE,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=80,
    ),
    "gpt_oss_all": lambda: GptOssConfig(
        **{**SIZES, "intermediate_size": 64},
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=WINDOW,
        rope_parameters=YARN | {"truncate": False},
    ),
    "gemma3_all": lambda: Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7, "tie_word_embeddings": True},
        architectures=["Gemma3ForCausalLM"],
        query_pre_attn_scalar=SIZES["head_dim"],
        sliding_window=WINDOW,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": ROPE,
        },
    ),
    "smollm3_all": lambda: SmolLM3Config(
        **{**SIZES, "num_hidden_layers": 4, "tie_word_embeddings": True}, rope_parameters=ROPE
    ),
}
"""Where a file says less: all layers have experts, every sixth attends to all of the context, every
fourth has no positions."""


@pytest.fixture(autouse=True)
def threads() -> None:
    native.start_threads((-1, -1))


FILE = Precision(quantization="file", head_quantization="file")


def imported(path: Path) -> Path:
    folder = path.with_suffix("")
    folder.mkdir()
    convert(path, folder, lambda _stage: None)
    (folder / "model.gguf").hardlink_to(path)
    check_model(folder)
    return folder


def assert_same(folder: Path, path: Path) -> None:
    ours, theirs = forward(load(imported(path))), forward(load(folder))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max())
        )


def test_every_architecture_is_tested() -> None:
    tested = {CONFIGS[name]().model_type for name in SAME} | {c().model_type for c in OWN.values()}
    assert {own.model_type for own in ARCHITECTURES.values()} - tested == set()


@pytest.mark.parametrize("name", SAME)
def test_logits_are_those_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / name, name)
    assert_same(folder, gguf_models.write_gguf_of(folder, tmp_path / "file.gguf"))


@pytest.mark.parametrize("name", OWN)
def test_so_are_those_that_leave_something_to_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(CONFIGS, name, OWN[name])
    folder = write_model(tmp_path / name, name)
    assert_same(folder, gguf_models.write_gguf_of(folder, tmp_path / "file.gguf"))


MIX = {"attn_v": Type.Q8_0, "ffn_down": Type.Q5_0, "ffn_up": Type.Q5_1, "token_embd": Type.Q8_0}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss_all", "qwen3_moe_all"])
def test_a_files_own_formats_run_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Against floats of the same values, but for the 8 bits of what goes into linears, and for
    tokens that these send to other experts."""
    monkeypatch.setattr("tests.support.architectures.CONFIGS", CONFIGS | OWN)
    folder = write_model(tmp_path / name, name)
    kinds = {**dict.fromkeys(("attn_q", "attn_k", "attn_qkv", "ffn_gate"), Type.Q4_0), **MIX}
    kinds |= {f"{name}_exps": kind for name, kind in kinds.items()}
    kinds["ffn_up_exps"] = kinds["ffn_gate_exps"]  # which gpt-oss has in one
    own = imported(gguf_models.write_gguf_of(folder, tmp_path / "file.gguf", kinds))
    exact, kept = forward(load(own)), forward(load(own, precision=FILE))
    for actual, expected in zip(kept, exact, strict=True):
        errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(errors.median()) < 0.1


LARGE = {
    "hidden_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
}


def peak_mb(program: Callable[[], object]) -> float:
    """What resident memory grows by while it runs, at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident_mb("VmRSS")
    program()
    return resident_mb("VmHWM") - before


def resident_mb(name: str) -> float:
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name)]
    return int(line.split()[1]) / 1024


def test_a_file_is_packed_in_little_more_than_its_size(tmp_path: Path) -> None:
    """As floats it would take seven times as much; its pages and a linear come on top of what is
    packed, and are gone by the next one."""
    path = write_blocks(tmp_path / "large.gguf", Type.Q4_K, **LARGE)
    size, loaded = path.stat().st_size / 2**20, []
    assert size > 45
    folder = tmp_path / "large"
    folder.mkdir()
    assert peak_mb(lambda: convert(path, folder, lambda _stage: None)) < 1.3 * size
    (folder / "model.gguf").hardlink_to(path)
    assert peak_mb(lambda: loaded.append(load(folder, precision=FILE))) < 1.3 * size + 32
    assert loaded[0].weights.nbytes() < 1.1 * size * 2**20 + 32 * 2**20
