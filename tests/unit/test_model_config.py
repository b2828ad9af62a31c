"""What a model folder's config.json may say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.errors import (
    InvalidRequest,
    ModelCorrupt,
    ModelNotFound,
    UnsupportedArchitecture,
)
from precast.models.config import load_config
from precast.models.options import LayerPlan, from_factor, to_factor
from precast.models.rope import RopeConfig

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
    assert config.ropes[0].rope_theta == 10000.0


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
    rope = load_config(write(tmp_path, **changes)).ropes[0]
    assert (rope.rope_theta, rope.rope_type, rope.factor) == (5e5, "linear", 2.0)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
]


@pytest.mark.parametrize("settings", ROPES)
def test_frequencies_are_those_of_transformers(settings: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": 500000.0, **settings}
    theirs = LlamaConfig(
        hidden_size=2048, num_attention_heads=32, head_dim=64, rope_parameters=parameters
    )
    expected, amplitude = ROPE_INIT_FUNCTIONS[settings["rope_type"]](theirs, torch.device("cpu"))
    ours = RopeConfig(**parameters)
    frequencies = torch.tensor(ours.inverse_frequencies(64))
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert ours.amplitude() == pytest.approx(amplitude, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type=yarn needs a factor"),
        ({"head_dim": 15}, "odd"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 0}, "zero"),
        ({"architectures": ["Gemma3ForCausalLM"], "layer_types": []}, "layer_types has 0"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "LlamaForCausalLM: hidden_act=gelu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type=longrope"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "su"}},
            "rope_type=su of Phi-3",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "hidden_activation": "silu"},
            "hidden_activation=silu",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "layer_types": ["chunked_attention"] * 2},
            "chunked_attention",
        ),
    ],
)
def test_a_feature_that_is_lacking_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=message):
        load_config(write(tmp_path, **changes))


def test_layers_of_gemma3_take_turns(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            architectures=["Gemma3ForCausalLM"],
            num_hidden_layers=7,
            sliding_window=512,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        )
    )
    sliding, full = LayerPlan("sliding", 1), LayerPlan("full", 0)
    assert config.layers == (*[sliding] * 5, full, sliding)
    assert [(rope.rope_theta, rope.factor) for rope in config.ropes] == [(1e6, 8.0), (1e4, 1.0)]
    assert (config.head_dim, config.tie_word_embeddings) == (256, True)
    assert to_factor(config.options) == (
        '{"kinds":["full","sliding"],"query_scale":0.0625,"ropes":2,"window":512}'
    )


def test_options_have_one_spelling() -> None:
    text = '{"kinds":["sliding"],"window":512}'
    assert to_factor(from_factor("mistral", text)) == text
    for other in ('{"window":512,"kinds":["sliding"]}', '{"window":0}', '{"mlp_bias":true}', "[]"):
        with pytest.raises(InvalidRequest, match="options"):
            from_factor("mistral", other)
    with pytest.raises(InvalidRequest, match="mamba is not one of: gemma3, llama"):
        from_factor("mamba", "{}")
