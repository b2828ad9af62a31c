"""Quantised Hugging Face folders: their values are what the kernels have, and what transformers
computes with the weights that they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from precast.config.settings import DecodeWorkerSettings, load_settings
from precast.errors import PrecastError
from precast.models.config import load_config
from precast.models.importing.catalog import check_weights
from precast.models.load import load_weights
from precast.models.precision import Precision, Quantization
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.ops.packing import Format, unpack
from tests.support.architectures import POSITIONS, SEQUENCES, forward, load, reference
from tests.support.quantized_folders import (
    SCHEMES,
    change_config,
    write_gpt_oss,
    write_quantized,
)

EXACT = 1e-6
"""Relative to the largest: a product of floats is rounded in one order or another."""
EIGHT_BITS = 1 / 254 + 2**-12
"""Half a step of 127, and what fp16 takes from its scale."""
FORMATS: dict[str, tuple[Quantization, float]] = {
    "w8a8": ("int8", EXACT),
    "w8a8_static": ("int8", EXACT),
    "w8a8_tensor": ("int8", EXACT),
    "w8a8_zeros": ("q8_0", EIGHT_BITS),
    "w4a16": ("q4_0", EXACT),
    "w4a16_rows": ("q4_0", EXACT),
    "w4a16_zeros": ("q4_1", 2**-11),
    "w4a16_act_order": ("q8_0", EIGHT_BITS),
    "w8a16_groups": ("q8_0", EXACT),
    "w8a16": ("int8", EXACT),
    "awq": ("q4_1", 2**-11),
    "gptq": ("q4_0", EXACT),
    "gptq_zeros": ("q4_1", 2**-11),
    "gptq_v2": ("q4_1", 2**-11),
    "gptq_act_order": ("q8_0", EIGHT_BITS),
    "gptq_8": ("q8_0", EXACT),
    "gptq_2": ("q4_0", EXACT),
    "fp8": ("q8_0", EIGHT_BITS),
    "fp8_scalar": ("q8_0", EIGHT_BITS),
    "fp8_rows": ("q8_0", EIGHT_BITS),
    "fp8_blocks": ("q8_0", EIGHT_BITS),
}
"""The format that each scheme is run in, and how far its weights are from the checkpoint's,
relative to the largest of a linear's."""
QKV = "model.layers.1.self_attn.{}_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    for name in SCHEMES:
        write_quantized(root / name, name)
    return root


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SCHEMES)
def test_kernels_have_the_checkpoints_own_values(name: str, folders: Path) -> None:
    folder = folders / name
    config = load_config(folder)
    check_weights(folder, config)
    fmt, bound = FORMATS[name]
    assert config.own_quantization == fmt
    part = shard(config, 0, 1)
    shape = shape_of(config, part, Precision(quantization=fmt, head_quantization="none"))
    weights = load_weights(folder, config, part, shape, POSITIONS)
    qkv, down = weights.layers[1].attention.qkv[0], weights.layers[1].mlp.down[0]
    floats = load_file(folder / "floats" / "model.safetensors")
    expected = torch.cat([floats[QKV.format(part)] for part in "qkv"])
    assert relative_error(unpack(qkv, *expected.shape, shape.linear_format), expected) <= bound
    expected = floats["model.layers.1.mlp.down_proj.weight"]
    assert relative_error(unpack(down, *expected.shape, shape.linear_format), expected) <= bound


@pytest.mark.parametrize("name", ["w8a8", "w4a16_zeros", "awq", "gptq_act_order", "fp8_blocks"])
def test_logits_are_those_of_the_weights_that_it_stands_for(name: str, folders: Path) -> None:
    expected = reference(folders / name / "floats")
    ours = forward(load(folders / name))
    own = forward(load(folders / name, precision=Precision(quantization=FORMATS[name][0])))
    for sequence, actual, quantized, right in zip(SEQUENCES, ours, own, expected, strict=True):
        assert relative_error(actual, right) < 1e-4, f"{len(sequence)} tokens"
        # inputs are rounded to 8 bits
        assert (quantized - right).norm() < 0.1 * right.norm(), f"{len(sequence)} tokens"


def copied(folder: Path, to: Path) -> Path:
    """Its files, but not what is in folders of its own."""
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, to / path.name)
    return to


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, folder / "model.safetensors")


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("scheme", "part", "change", "said"),
    [
        ("w8a8", "weight", lambda _: None, "weight is missing"),
        ("w8a8", "weight", lambda t: t.float(), "has type F32, which is not one of: I8"),
        ("w8a8", "weight_scale", lambda t: t[:-1].clone(), "weight_scale has shape (95, 1)"),
        ("w8a8", "weight_scale", lambda t: t * torch.nan, "weight_scale: a scale is not finite"),
        ("w4a16", "weight_packed", lambda t: t[:, 1:].clone(), "has shape (96, 11), not (96, 12)"),
        ("w4a16_act_order", "weight_g_idx", lambda _: None, "weight_g_idx is missing"),
        ("w4a16_act_order", "weight_g_idx", lambda t: t + 1, "an input's group is none of 3"),
        ("awq", "qzeros", lambda _: None, "qzeros is missing"),
        ("gptq", "qweight", lambda t: t.to(torch.int64), "has type I64"),
        ("gptq", "qzeros", lambda t: t - 1, "not half of the range, but sym is true"),
        ("gptq", "g_idx", lambda t: t.flip(0), "groups in any order, but desc_act is false"),
        ("gptq", "scales", lambda t: t * torch.inf, "scales: a scale is not finite"),
        ("fp8_blocks", "weight_scale_inv", lambda t: t[:1].clone(), "has shape (1, 2), not (3, 2)"),
        ("fp8_blocks", "weight_scale_inv", lambda _: None, "has type F8_E4M3"),
    ],
)
def test_damaged_tensors_are_one_line(
    scheme: str,
    part: str,
    change: Callable[[Tensor], Tensor | None],
    said: str,
    folders: Path,
    tmp_path: Path,
) -> None:
    folder = copied(folders / scheme, tmp_path)
    change_tensor(folder, f"{O_PROJ}.{part}", change)
    with pytest.raises(PrecastError) as caught:
        config = load_config(folder)
        check_weights(folder, config)
        load(folder)
    assert said in str(caught.value) and O_PROJ in str(caught.value)
    assert "\n" not in str(caught.value)


def add_tensors(folder: Path, **tensors: Tensor) -> None:
    """By what follows the name of a layer's attention."""
    named = {f"model.layers.0.self_attn.{name}": tensor for name, tensor in tensors.items()}
    save_file(load_file(folder / "model.safetensors") | named, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_biases_of_zeros_that_the_model_has_not_are_left(
    dtype: torch.dtype, folders: Path, tmp_path: Path
) -> None:
    """AutoGPTQ writes one for each linear."""
    folder = copied(folders / "gptq", tmp_path)
    add_tensors(folder, **{"o_proj.bias": torch.zeros(96, dtype=dtype)})
    check_weights(folder, load_config(folder))
    add_tensors(folder, **{"o_proj.bias": torch.eye(96, dtype=dtype)[-1].clone()})
    with pytest.raises(PrecastError, match=r"o_proj\.bias is none of a llama model's"):
        check_weights(folder, load_config(folder))


def test_scales_of_caches_are_left(folders: Path, tmp_path: Path) -> None:
    folder = copied(folders / "w8a8", tmp_path)
    names = ("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point")
    add_tensors(folder, **{name: torch.ones(1) for name in names})
    check_weights(folder, load_config(folder))


def changed(scheme: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(json.dumps(SCHEMES[scheme][0]))
    return settings | changes


def changed_weights(scheme: str, **changes: Any) -> dict[str, Any]:
    settings = changed(scheme)
    settings["config_groups"]["group_0"]["weights"] |= changes
    return settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (changed("gptq", bits=3), "bits = 3 is not one of: 2, 4, 8"),
        (changed("gptq", bits="4"), "bits = '4': expected a whole number"),
        (changed("gptq", group_size=0), "group_size = 0: expected -1 or a positive number"),
        (changed("gptq", checkpoint_format="marlin"), "checkpoint_format = 'marlin'"),
        (changed("awq", version="gemv"), "version = 'gemv' is not one of: gemm"),
        (changed("awq", bits=8), "bits = 8"),
        (changed("fp8", fmt="e5m2"), "fmt = 'e5m2'"),
        (changed("fp8", weight_block_size=[128]), "weight_block_size: expected two"),
        (changed("w8a8", format="marlin-24"), "format = 'marlin-24'"),
        (changed("w8a8", config_groups={}), "config_groups is missing"),
        (changed("w8a8", config_groups={"a": {"weights": 1}, "b": {}}), "several kinds"),
        (changed("w8a8", sparsity_config={"format": "2:4"}), "format = '2:4'"),
        (changed("w8a8", transform_config={"x": 1}), "rotated weights"),
        (changed_weights("w8a8", num_bits=4), "num_bits = 4 is not supported"),
        (changed_weights("w8a8", dynamic=True), "dynamic = True"),
        (changed_weights("w4a16", strategy="token"), "strategy = 'token'"),
        (changed_weights("w4a16", group_size=1 << 60), "expected -1 or a positive number"),
        (changed_weights("fp8_rows", strategy="block"), "block_structure: expected two"),
        ({"quant_method": "bitsandbytes"}, "of this kind are not supported"),
        (["?"], "of this kind are not supported"),
    ],
)
def test_what_is_not_supported_is_one_line(settings: Any, said: str, tmp_path: Path) -> None:
    change_config(_folder(tmp_path), quantization_config=settings)
    with pytest.raises(PrecastError) as caught:
        load_config(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def _folder(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


def test_floats_that_are_said_to_be_quantised_are_one_line(folders: Path, tmp_path: Path) -> None:
    folder = copied(folders / "gptq" / "floats", tmp_path)
    change_config(folder, quantization_config=SCHEMES["gptq"][0])
    with pytest.raises(PrecastError, match="no tensor of such is there"):
        check_weights(folder, load_config(folder))


@pytest.mark.parametrize(
    ("scheme", "name", "settings"),
    [
        ("gptq", "quantize_config.json", SCHEMES["gptq"][0]),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ],
)
def test_old_folders_say_it_in_a_file_of_its_own(
    scheme: str, name: str, settings: dict[str, Any], folders: Path, tmp_path: Path
) -> None:
    folder = copied(folders / scheme, tmp_path)
    change_config(folder, quantization_config=None)
    (folder / name).write_text(json.dumps(settings))
    config = load_config(folder)
    assert config.own_quantization == FORMATS[scheme][0]
    check_weights(folder, config)


@pytest.mark.parametrize(
    ("setting", "own", "layers", "head"),
    [
        ("auto", "int8", "int8", "int8"),
        ("auto", "q4_0", "q4_0", "q8_0"),
        ("auto", None, "q4_1", "q8_0"),
        ("none", "int8", "none", "none"),
    ],
)
def test_auto_is_the_checkpoints_own_format(
    setting: str, own: Quantization | None, layers: str, head: str
) -> None:
    precision = load_settings(DecodeWorkerSettings, quantization=setting).precision(own)
    assert (precision.quantization, precision.head_quantization) == (layers, head)


VALUES = (
    None,
    -1,
    0,
    3,
    2**63,
    1e308,
    float("nan"),
    "",
    "x" * 500,
    "\n",
    [],
    {},
    [[]],
    True,
    [0, 0],
)


def mutated(value: Any, random: Random) -> Any:
    """A value with one entry gone, renamed or replaced, at any depth."""
    if not isinstance(value, dict) or not value or random.random() < 0.1:
        return random.choice(VALUES)
    name, rest = random.choice(list(value)), dict(value)
    kept = rest.pop(name)
    if random.random() < 0.2:
        return rest | {str(random.choice(VALUES)): kept}
    return rest | {name: mutated(kept, random)} if random.random() < 0.9 else rest


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_zeros", "awq", "gptq", "fp8_blocks"])
def test_whatever_a_config_says_is_one_line(scheme: str, folders: Path, tmp_path: Path) -> None:
    random, lines = Random(scheme), list[str]()
    folder = copied(folders / scheme, tmp_path)
    for _ in range(60):
        change_config(folder, quantization_config=mutated(SCHEMES[scheme][0], random))
        try:
            check_weights(folder, load_config(folder))
        except PrecastError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert all("\n" not in line and len(line) < 900 for line in lines)


def test_experts_of_mxfp4_are_what_they_stand_for(tmp_path: Path) -> None:
    folder = write_gpt_oss(tmp_path)
    config = load_config(folder)
    check_weights(folder, config)
    assert config.own_quantization == "file"
    own = Precision(quantization="file", head_quantization="file")
    ours, kept = forward(load(folder)), load(folder, precision=own)
    floats = load_file(folder / "floats" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    expected = floats[name][1].T  # a kernel's own values
    found = unpack(kept.weights.layers[0].mlp.down[1], *expected.shape, Format.MIXED)
    assert torch.equal(found, expected)
    for actual, quantized, right in zip(
        ours, forward(kept), reference(folder / "floats"), strict=True
    ):
        assert relative_error(actual, right) < 1e-4
        assert (quantized - right).norm() < 0.1 * right.norm()
    change_tensor(folder, f"{name}_scales", lambda t: t.fill_(255))
    with pytest.raises(PrecastError, match="scales that are no numbers"):
        load(folder, precision=own)
