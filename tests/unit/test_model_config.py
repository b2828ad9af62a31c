"""What a model folder's config.json may say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.errors import ModelCorrupt, ModelNotFound, UnsupportedArchitecture
from precast.models.config import RopeConfig, load_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}


def write(folder: Path, **changes: Any) -> Path:
    values = {k: v for k, v in {**BASE, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_plain_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert (config.q_heads, config.kv_heads, config.head_dim) == (4, 2, 16)
    assert config.eos_token_ids == (2,)
    assert config.rope.rope_theta == 10000.0


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_config(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_rope_as_old_and_new_files_spell_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    rope = load_config(write(tmp_path, **changes)).rope
    assert (rope.rope_theta, rope.rope_type, rope.factor) == (5e5, "linear", 2.0)


def test_llama3_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaConfig(
        hidden_size=2048, num_attention_heads=32, head_dim=64, rope_parameters=parameters
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    ours = RopeConfig(**parameters).inverse_frequencies(64)
    torch.testing.assert_close(torch.tensor(ours), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type=yarn"),
        ({"head_dim": 15}, "odd"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelCorrupt, match=message) as caught:
        load_config(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_no_json_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        load_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelCorrupt):
        load_config(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        load_config(write(tmp_path, architectures=["MambaForCausalLM"]))
