"""Quantised Hugging Face folders, by the schemes' own packing loops, and what their weights stand
for: nothing here is of the code that reads them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.architectures import write_model

Array = NDArray[Any]
Stored = dict[str, Tensor]
Maker = Callable[[Array], tuple[Stored, Tensor]]
"""A linear's weights [outputs, inputs] to its tensors, by what follows the module's name, and to
the weights that these stand for."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP = 32
FP8_BLOCK = (32, 64)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def int8_channels(weight: Array) -> tuple[Stored, Tensor]:
    """As compressed-tensors does: the range is 255 wide, and its lower end is -128."""
    scale = torch.tensor(numpy.abs(weight).max(1, keepdims=True) / 127.5).bfloat16()
    values = torch.round(torch.tensor(weight) / scale.float()).clamp(-128, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale.float()


def int8_static(weight: Array) -> tuple[Stored, Tensor]:
    stored, whole = int8_channels(weight)
    fixed = {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.zeros(1).to(torch.int8)}
    return stored | fixed, whole


def int8_tensor(weight: Array) -> tuple[Stored, Tensor]:
    scale = torch.tensor([numpy.abs(weight).max() / 127.5], dtype=torch.float32)
    values = torch.round(torch.tensor(weight) / scale).clamp(-128, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale


def int8_zeros(weight: Array) -> tuple[Stored, Tensor]:
    """A scale and a zero point for each row."""
    low, high = numpy.minimum(weight.min(1, keepdims=True), 0), weight.max(1, keepdims=True)
    scale = torch.tensor((high - low) / 255).float()
    zeros = torch.round(torch.tensor(-low) / scale) - 128
    values = (torch.round(torch.tensor(weight) / scale) + zeros).clamp(-128, 127)
    stored = {"weight": values.to(torch.int8), "weight_scale": scale}
    return stored | {"weight_zero_point": zeros.to(torch.int8)}, (values - zeros) * scale


def packed_words(values: Array, bits: int) -> Tensor:
    """int32 words of numbers below 2^bits along the columns, the first one lowest."""
    each = 32 // bits
    padded = numpy.pad(values.astype(numpy.uint32), ((0, 0), (0, -values.shape[1] % each)))
    words = numpy.zeros((len(values), padded.shape[1] // each), numpy.uint32)
    for place in range(each):
        words |= padded[:, place::each] << numpy.uint32(bits * place)
    return torch.tensor(words.view(numpy.int32))


def grouped(weight: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Numbers from 0 on, zero points and fp16 scales of groups of inputs."""
    groups = weight.reshape(len(weight), -1, GROUP)
    most, half = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = (numpy.abs(groups).max(2) * 2 / most).astype(numpy.float16).astype(numpy.float32)
        zeros = numpy.full(scales.shape, half, numpy.int64)
    else:
        low, high = numpy.minimum(groups.min(2), 0), numpy.maximum(groups.max(2), 0)
        scales = ((high - low) / most).astype(numpy.float16).astype(numpy.float32)
        zeros = numpy.clip(numpy.round(-low / scales), 0, most).astype(numpy.int64)
        zeros[0, 0] = 0
    numbers = numpy.round(groups / scales[..., None]) + zeros[..., None]
    return numpy.clip(numbers, 0, most).astype(numpy.int64).reshape(weight.shape), zeros, scales


def whole(numbers: Array, zeros: Array, scales: Array) -> Tensor:
    groups = numbers.reshape(*scales.shape, GROUP) - zeros[..., None]
    return torch.tensor((groups * scales[..., None]).reshape(numbers.shape).astype(numpy.float32))


def pack_quantized(bits: int, symmetric: bool) -> Maker:
    def make(weight: Array) -> tuple[Stored, Tensor]:
        numbers, zeros, scales = grouped(weight, bits, symmetric)
        stored = {
            "weight_packed": packed_words(numbers, bits),
            "weight_scale": torch.tensor(scales).half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = packed_words(zeros.T, bits).T.contiguous()
        return stored, whole(numbers, zeros, scales)

    return make


def pack_channels(weight: Array) -> tuple[Stored, Tensor]:
    """8 bits in words, a scale for each row."""
    stored, values = int8_channels(weight)
    numbers = stored["weight"].numpy().astype(numpy.int64) + 128
    packed = {"weight_packed": packed_words(numbers, 8), "weight_shape": torch.tensor(weight.shape)}
    return packed | {"weight_scale": stored["weight_scale"]}, values


def pack_rows(weight: Array) -> tuple[Stored, Tensor]:
    """4 bits in words, a scale for each row."""
    scale = torch.tensor(numpy.abs(weight).max(1, keepdims=True) / 7.5).half().float()
    values = torch.round(torch.tensor(weight) / scale).clamp(-8, 7)
    packed = packed_words(values.numpy().astype(numpy.int64) + 8, 4)
    stored = {"weight_packed": packed, "weight_shape": torch.tensor(weight.shape)}
    return stored | {"weight_scale": scale.half()}, values * scale


def shuffled(weight: Array) -> tuple[Array, Array]:
    """Inputs in the order in which they are quantised, and each input's group."""
    order = numpy.random.default_rng(weight.shape[1]).permutation(weight.shape[1])
    groups = numpy.empty(len(order), numpy.int32)
    groups[order] = numpy.arange(len(order)) // GROUP
    return order, groups


def in_any_order(weight: Array, symmetric: bool) -> tuple[Array, Array, Array, Array, Tensor]:
    order, groups = shuffled(weight)
    ordered, zeros, scales = grouped(weight[:, order], 4, symmetric)
    numbers, values = numpy.empty_like(ordered), torch.empty(weight.shape)
    numbers[:, order], values[:, torch.tensor(order)] = ordered, whole(ordered, zeros, scales)
    return numbers, zeros, scales, groups, values


def pack_act_order(weight: Array) -> tuple[Stored, Tensor]:
    numbers, _, scales, groups, values = in_any_order(weight, True)
    stored = {
        "weight_packed": packed_words(numbers, 4),
        "weight_scale": torch.tensor(scales).half(),
        "weight_shape": torch.tensor(weight.shape),
        "weight_g_idx": torch.tensor(groups),
    }
    return stored, values


def awq(weight: Array) -> tuple[Stored, Tensor]:
    numbers, zeros, scales = grouped(weight, 4, False)

    def words(of: Array) -> Tensor:
        packed = numpy.zeros((len(of), of.shape[1] // 8), numpy.uint32)
        for column in range(packed.shape[1]):
            for place in range(8):
                number = of[:, column * 8 + AWQ_ORDER[place]].astype(numpy.uint32)
                packed[:, column] |= number << numpy.uint32(4 * place)
        return torch.tensor(packed.view(numpy.int32))

    stored = {
        "qweight": words(numbers.T),
        "qzeros": words(zeros.T),
        "scales": torch.tensor(scales.T).half().contiguous(),
    }
    return stored, whole(numbers, zeros, scales)


def less_one(bits: int) -> int:
    """What GPTQModel subtracts from words of zero points; a 0 borrows from the next."""
    return sum(1 << place for place in range(0, 32, bits))


def gptq(bits: int, symmetric: bool, *, v2: bool = False, act_order: bool = False) -> Maker:
    def make(weight: Array) -> tuple[Stored, Tensor]:
        groups = (numpy.arange(weight.shape[1]) // GROUP).astype(numpy.int32)
        if act_order:
            numbers, zeros, scales, groups, values = in_any_order(weight, symmetric)
        else:
            numbers, zeros, scales = grouped(weight, bits, symmetric)
            values = whole(numbers, zeros, scales)
        stored = {
            "qweight": packed_words(numbers, bits).T.contiguous(),
            "qzeros": packed_words(zeros.T, bits) - (0 if v2 else less_one(bits)),
            "scales": torch.tensor(scales.T).half().contiguous(),
            "g_idx": torch.tensor(groups),
        }
        return stored, values

    return make


def fp8_tensor(weight: Array) -> tuple[Stored, Tensor]:
    scale = torch.tensor([numpy.abs(weight).max() / 448], dtype=torch.float32)
    values = (torch.tensor(weight) / scale).to(torch.float8_e4m3fn)
    stored = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor([0.5])}
    return stored, values.float() * scale


def fp8_scalar(weight: Array) -> tuple[Stored, Tensor]:
    """As transformers has it: a scale without dimensions."""
    stored, whole = fp8_tensor(weight)
    scale = stored.pop("weight_scale").reshape(())
    return stored | {"weight_scale_inv": scale, "activation_scale": scale.clone()}, whole


def fp8_rows(weight: Array) -> tuple[Stored, Tensor]:
    scale = torch.tensor(numpy.abs(weight).max(1, keepdims=True) / 448).float()
    values = (torch.tensor(weight) / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def fp8_blocks(weight: Array) -> tuple[Stored, Tensor]:
    rows, columns = FP8_BLOCK
    counts = [-(-size // of) for size, of in zip(weight.shape, FP8_BLOCK, strict=True)]
    scales, expanded = torch.empty(counts), torch.empty(weight.shape)
    for i in range(counts[0]):
        for j in range(counts[1]):
            block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = expanded[block] = float(numpy.abs(weight[block]).max()) / 448
    values = (torch.tensor(weight) / expanded).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scales}, values.float() * expanded


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": weights, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _packed(bits: int, symmetric: bool, **weights: Any) -> dict[str, Any]:
    settings = {"strategy": "group", "group_size": GROUP} | weights
    return _compressed("pack-quantized", num_bits=bits, symmetric=symmetric, **settings)


def _gptq(bits: int, **more: Any) -> dict[str, Any]:
    plain = {"desc_act": False, "sym": True, "static_groups": False}
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP} | plain | more


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
SCHEMES: dict[str, tuple[dict[str, Any], Maker]] = {
    "w8a8": (_compressed("int-quantized", strategy="channel"), int8_channels),
    "w8a8_static": (_compressed("int-quantized", strategy="channel"), int8_static),
    "w8a8_tensor": (_compressed("int-quantized", strategy="tensor"), int8_tensor),
    "w8a8_zeros": (
        _compressed("int-quantized", strategy="channel", symmetric=False),
        int8_zeros,
    ),
    "w4a16": (_packed(4, True), pack_quantized(4, True)),
    "w4a16_rows": (_packed(4, True, strategy="channel", group_size=None), pack_rows),
    "w4a16_zeros": (_packed(4, False), pack_quantized(4, False)),
    "w4a16_act_order": (_packed(4, True, actorder="group"), pack_act_order),
    "w8a16_groups": (_packed(8, True), pack_quantized(8, True)),
    "w8a16": (_packed(8, True, strategy="channel", group_size=None), pack_channels),
    "awq": (AWQ, awq),
    "gptq": (_gptq(4), gptq(4, True)),
    "gptq_zeros": (_gptq(4, sym=False), gptq(4, False)),
    "gptq_v2": (_gptq(4, sym=False, checkpoint_format="gptq_v2"), gptq(4, False, v2=True)),
    "gptq_act_order": (_gptq(4, desc_act=True), gptq(4, True, act_order=True)),
    "gptq_8": (_gptq(8), gptq(8, True)),
    "gptq_2": (_gptq(2), gptq(2, True)),
    "fp8": (FP8, fp8_tensor),
    "fp8_scalar": (FP8, fp8_scalar),
    "fp8_rows": (_compressed("float-quantized", type="float", strategy="channel"), fp8_rows),
    "fp8_blocks": (FP8 | {"weight_block_size": list(FP8_BLOCK)}, fp8_blocks),
}
"""By name: what ``config.json`` says, and the maker of a linear's tensors."""


def write_quantized(folder: Path, scheme: str, model: str = "llama") -> Path:
    """A tiny random model whose layers are quantised. In ``folder/floats`` the model that its
    weights stand for, as transformers can read it."""
    text, floats = _model(model)
    plain = folder / "floats"
    plain.mkdir(parents=True)
    for path in (plain, folder):
        (path / "config.json").write_text(text)
    save_file(quantize(folder, floats, scheme), plain / "model.safetensors")
    return folder


@cache
def _model(name: str) -> tuple[str, Stored]:
    """A tiny model's ``config.json`` and tensors."""
    with TemporaryDirectory() as folder:
        plain = write_model(Path(folder), name)
        floats = {n: t for path in plain.glob("*.safetensors") for n, t in load_file(path).items()}
        return (plain / "config.json").read_text(), floats


def quantize(folder: Path, floats: Stored, scheme: str) -> Stored:
    """Writes a model's tensors to a folder with its linears quantised; what these stand for."""
    settings, make = SCHEMES[scheme]
    stored, whole = Stored(), Stored()
    for name, tensor in floats.items():
        module = name.removesuffix(".weight")
        if module == name or not module.endswith(LINEARS):
            stored[name] = whole[name] = tensor.contiguous()
            continue
        parts, whole[name] = make(tensor.float().numpy())
        stored |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(stored, folder / "model.safetensors")
    change_config(folder, quantization_config=settings)
    return {name: tensor.contiguous() for name, tensor in whole.items()}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes [..., groups, 16] and exponents [..., groups] of floats [..., inputs], and what these
    stand for."""
    groups = weight.unflatten(-1, (-1, GROUP))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1) / 4))
    scaled = groups / torch.exp2(exponents)[..., None]
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    codes = (scaled[..., None] - table).abs().argmin(-1).to(torch.uint8)
    values = table[codes.long()] * torch.exp2(exponents)[..., None]
    blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
    return blocks, (exponents + 127).to(torch.uint8), values.flatten(-2)


def write_gpt_oss(folder: Path) -> Path:
    """A tiny gpt-oss with experts of MXFP4; in ``folder/floats`` what its weights stand for."""
    text, floats = _model("gpt_oss")
    stored = Stored()
    for name in [name for name in floats if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, values = mxfp4(floats[name].transpose(1, 2).contiguous())
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats = {**floats, name: values.transpose(1, 2).contiguous()}
    plain = folder / "floats"
    plain.mkdir(parents=True)
    for path in (plain, folder):
        (path / "config.json").write_text(text)
    rest = {name: tensor for name, tensor in floats.items() if f"{name}_blocks" not in stored}
    save_file(stored | rest, folder / "model.safetensors")
    save_file(floats, plain / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    return folder
