"""What a model folder's config.json may say."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from precast.errors import (
    InvalidRequest,
    ModelCorrupt,
    ModelNotFound,
    UnsupportedArchitecture,
)
from precast.models.config import load_config
from precast.models.options import LayerPlan, from_factor, to_factor
from precast.models.rope import RopeConfig
from tests.support.models import write_model

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


FILES: dict[str, dict[str, Any]] = {
    "config.json": {**BASE, "eos_token_id": 2},
    "generation_config.json": {"eos_token_id": [3, 7]},
    "tokenizer_config.json": {
        "eos_token": {"content": "<end>"},
        "added_tokens_decoder": {"9": {"content": "<end>"}, "4": {"content": "<pad>"}},
    },
}


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        (("config.json",), (2,)),
        (("generation_config.json",), (3, 7)),
        (("tokenizer_config.json",), (9,)),
        (("config.json", "generation_config.json", "tokenizer_config.json"), (3, 7, 2, 9)),
        ((), ()),
    ],
)
def test_all_files_that_name_an_end_are_heard(
    tmp_path: Path, named: tuple[str, ...], ends: tuple[int, ...]
) -> None:
    for name, content in FILES.items():
        silent = {key: value for key, value in content.items() if not key.startswith("eos_token")}
        (tmp_path / name).write_text(json.dumps(content if name in named else silent))
    assert load_config(tmp_path).eos_token_ids == ends


def test_an_end_that_only_the_vocabulary_numbers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny", eos_token_id=None)
    assert load_config(folder).eos_token_ids == (256,)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<unheard of>"}')
    assert load_config(folder).eos_token_ids == ()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-1, 100, 10**6, True, "12", 1.5, [2, None], {"id": 2}])
def test_an_end_that_is_no_token_is_refused(tmp_path: Path, file: str, value: object) -> None:
    write(tmp_path)
    content = {**BASE, "eos_token_id": value} if file == "config.json" else {"eos_token_id": value}
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ModelCorrupt, match="eos_token_id"):
        load_config(tmp_path)


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
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": 500000.0, **settings}
    theirs = transformers.LlamaConfig(
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
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 5e-324}}, "no finite angles"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 .* 1 to 1024"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": []}, "num_attention_heads"),
        ({"hidden_size": 10**40}, "hidden_size"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"intermediate_size": 10**12}, "intermediate_size"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"attention_bias": "perhaps"}, "attention_bias"),
        ({"rope_scaling": [1]}, "config.json"),
        (
            {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": math.nan},
            "attention_softcap is nan",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": -4},
            "query_pre_attn_scalar",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 0}, "zero"),
        (
            {
                "architectures": ["Phi3ForCausalLM"],
                "rope_scaling": {"type": "default", "partial_rotary_factor": 2.0},
            },
            "can't be rotated",
        ),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelCorrupt, match=message) as caught:
        load_config(write(tmp_path, **changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - started < 2.0


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"\xff\xfe{", b'{"hidden_size": ' + b"9" * 5000 + b"}", b"[1, 2]", b""],
)
def test_what_is_no_json_object_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelCorrupt, match=r"config\.json: ") as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [[{}], {}, "Mamba", ["\n"], [None], [["x"]], 5])
def test_whatever_architectures_holds_is_one_line(tmp_path: Path, value: object) -> None:
    with pytest.raises(
        UnsupportedArchitecture, match="is not one of: Exaone4ForCausalLM"
    ) as caught:
        load_config(write(tmp_path, architectures=value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bits"),
        ({"quantization_config": ["?"]}, "quantization_config"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
    ],
)
def test_quantized_weights_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=named):
        load_config(write(tmp_path, **changes))


def test_no_quantization_is_no_quantization(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, quantization_config=None)).hidden_size == 64


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
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type=dynamic"),
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


@pytest.mark.parametrize("name", ["Exaone4", "Gemma3Text", "GptOss", "Mistral", "Mixtral", "Phi3"])
def test_a_window_that_is_left_out_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    theirs = getattr(transformers, f"{name}Config")()
    architecture = f"{name.removesuffix('Text')}ForCausalLM"
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_act": "silu"}
    config = load_config(write(tmp_path, architectures=[architecture], **more))
    assert getattr(config.options, "window", 0) == (theirs.sliding_window or 0)
    none = load_config(write(tmp_path, architectures=[architecture], **more, sliding_window=None))
    assert getattr(none.options, "window", 0) == 0


def test_options_have_one_spelling() -> None:
    text = '{"kinds":["sliding"],"window":512}'
    assert to_factor(from_factor("mistral", text)) == text
    for other in ('{"window":512,"kinds":["sliding"]}', '{"window":0}', '{"mlp_bias":true}', "[]"):
        with pytest.raises(InvalidRequest, match="options"):
            from_factor("mistral", other)
    with pytest.raises(InvalidRequest, match="mamba is not one of: exaone4, gemma3"):
        from_factor("mamba", "{}")
