"""The linear operator in every weight format, for shapes that are multiples of nothing."""

import numpy
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from precast.ops import native
from precast.ops.packing import GROUP, Format, pack, quantize_groups, quantize_int8, unpack
from precast.system.cpu import this_cpu

FLOATS = [Format.FP32, Format.BF16, Format.FP16]
GROUPED = [Format.Q8_0, Format.Q4_0, Format.Q4_1]
SHAPES = [(1, 1), (7, 5), (16, 64), (33, 66), (48, 576), (100, 257)]
BATCHES = [1, 2, 3, 5, 8, 13, 65]


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


def atol_of(fmt: Format) -> float:
    """Of sums of up to 576 products. AMX takes an input as two bf16, 16 bits of it; one bf16 would
    be off by 0.1."""
    return 5e-4 if fmt == Format.BF16 and this_cpu().amx else 1e-4


def run(x: Tensor, packed: Tensor, bias: Tensor | None, n: int, fmt: Format) -> Tensor:
    y: Tensor = torch.ops.precast.linear(x, packed, bias, n, int(fmt))
    return y


def quantized_inputs(x: Tensor, group: int) -> Tensor:
    """The inputs that the kernel computes with: rounded to 127 steps of each group's largest."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).view(x.shape[0], -1, group)
    scale = padded.abs().amax(dim=2, keepdim=True) / 127
    steps = torch.where(scale > 0, padded / scale, torch.zeros_like(padded)).round()
    return (steps.double() * scale.double()).view(x.shape[0], -1)[:, : x.shape[1]]


def assert_close_but_for_halves(actual: Tensor, expected: Tensor, step: float) -> None:
    """A value halfway between two steps may go either way: one step of one input at the most."""
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=step * 1.01 + 1e-5)
    assert (actual.double() - expected).abs().median() < 1e-5


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("fmt", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_floats_agree_with_torch(n: int, k: int, fmt: Format, with_bias: bool) -> None:
    weight = torch.randn(n, k)
    packed = pack(weight, fmt)
    bias = torch.randn(n) if with_bias else None
    for m in BATCHES:
        x = torch.randn(m, k)
        expected = torch.nn.functional.linear(x.double(), unpack(packed, n, k, fmt).double())
        expected = expected + bias.double() if bias is not None else expected
        actual = run(x, packed, bias, n, fmt)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=atol_of(fmt))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("fmt", [Format.INT8, *GROUPED])
def test_quantized_agree_with_exact_arithmetic(n: int, k: int, fmt: Format) -> None:
    weight, bias = torch.randn(n, k), torch.randn(n)
    packed = pack(weight, fmt)
    meant = unpack(packed, n, k, fmt).double()
    for m in BATCHES:
        x = torch.randn(m, k)
        x[0] = 0  # a row of zeros has no scale
        inputs = quantized_inputs(x, GROUP)
        step = float(x.abs().max() / 127 * meant.abs().max())
        assert_close_but_for_halves(run(x, packed, bias, n, fmt), inputs @ meant.T + bias, step)


@pytest.mark.parametrize("fmt", [Format.INT8, *GROUPED])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_do_not_saturate(fmt: Format, sign: float) -> None:
    weight = torch.full((16, 512), 1.0)
    weight[:, ::2] = -1.0  # so that the 4-bit formats use both ends of their range
    packed = pack(weight, fmt)
    x = weight[:1] * sign
    expected = x @ unpack(packed, 16, 512, fmt).T
    assert expected.abs().min() > 400
    one = run(x, packed, None, 16, fmt)
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=0)
    assert torch.equal(run(x.expand(17, -1), packed, None, 16, fmt), one.expand(17, -1))


def test_int8_weights_are_rounded_to_the_nearest_step() -> None:
    weight = torch.randn(33, 70)
    quantized, scales = quantize_int8(weight)
    assert int(quantized.abs().max()) == 127
    error = (quantized * scales[:, None] - weight).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    assert torch.equal(
        unpack(pack(weight, Format.INT8), 33, 70, Format.INT8), quantized * scales[:, None]
    )


@pytest.mark.parametrize(
    ("fmt", "steps"), [(Format.Q8_0, 0.51), (Format.Q4_0, 1.01), (Format.Q4_1, 0.55)]
)
def test_groups_lose_at_most_a_step(fmt: Format, steps: float) -> None:
    """Q4_0 covers -8 to 7 steps, so a value at the other end may lose a whole one."""
    weight = torch.randn(32, 192)
    scale = quantize_groups(weight, fmt)[1][0].float().abs().repeat_interleave(GROUP, dim=1)
    error = (unpack(pack(weight, fmt), 32, 192, fmt) - weight).abs()
    assert (error <= scale * steps + 2e-3).all()


@pytest.mark.parametrize("fmt", GROUPED)
@pytest.mark.parametrize("k", [64, 96])
def test_weights_out_of_such_groups_come_back_exactly(fmt: Format, k: int) -> None:
    """A GGUF file that was dequantised at import loses nothing when it is packed again."""
    once = unpack(pack(torch.randn(48, k) * 0.02, fmt), 48, k, fmt)
    assert torch.equal(unpack(pack(once, fmt), 48, k, fmt), once)


def any_blocks(kind: GGMLQuantizationType, generator: numpy.random.Generator) -> Tensor:
    """[48, 512] weights out of a GGUF format's blocks with any values in them, as a quantiser may
    leave them that searches for scales: not all use both ends of their range."""
    size, length = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (48 * 512 // size, length), dtype=numpy.uint8)
    halves = 1 if kind == GGMLQuantizationType.Q4_0 else 2
    scales = generator.uniform(0.01, 0.1, (len(blocks), halves))
    if kind == GGMLQuantizationType.Q4_0:
        scales[::3] *= -1
    elif kind == GGMLQuantizationType.Q4_1:
        scales[:, 1] *= -4
    blocks[:, : 2 * halves] = scales.astype(numpy.float16).view(numpy.uint8)
    if kind != GGMLQuantizationType.Q4_K:  # every second one has neither end
        values = blocks[:, 2 * halves :]
        values[::2] = numpy.clip(values[::2] & 15, 3, 12) | 0xA0
    return torch.from_numpy(dequantize(blocks, kind)).view(48, 512)


@pytest.mark.parametrize(
    ("kind", "fmt"),
    [(GGMLQuantizationType.Q4_0, Format.Q4_0), (GGMLQuantizationType.Q4_1, Format.Q4_1)],
)
def test_any_blocks_of_a_gguf_file_come_back_exactly(
    kind: GGMLQuantizationType, fmt: Format
) -> None:
    weight = any_blocks(kind, numpy.random.default_rng(0))
    assert torch.equal(unpack(pack(weight, fmt), 48, 512, fmt), weight)


def test_groups_on_a_grid_are_found_wherever_they_lie() -> None:
    weight = any_blocks(GGMLQuantizationType.Q4_0, numpy.random.default_rng(0)).repeat(22, 2)
    weight[:, :32] = torch.randn(len(weight), 32)
    weight[::4] = torch.randn(len(weight[::4]), 1024)
    packed = unpack(pack(weight, Format.Q4_0), *weight.shape, Format.Q4_0)
    found = (packed == weight).view(len(weight), -1, 32).all(2)
    kept = torch.ones_like(found)
    kept[:, 0] = kept[::4] = False
    assert torch.equal(found, kept)


def test_a_k_quant_keeps_its_grid() -> None:
    """Only its scales and minima, products of two numbers, are rounded to half precision."""
    weight = any_blocks(GGMLQuantizationType.Q4_K, numpy.random.default_rng(0))
    error = (unpack(pack(weight, Format.Q4_1), 48, 512, Format.Q4_1) - weight).abs()
    largest = weight.view(48, -1, 32).abs().amax(2).repeat_interleave(32, 1)
    assert (error <= largest * 2**-9).all()


def rounded_to_nearest(weight: Tensor, fmt: Format) -> Tensor:
    """As llama.cpp does: the largest weight is -8 steps of Q4_0, the ends are 0 and 15 of Q4_1."""
    groups = weight.view(len(weight), -1, GROUP)
    if fmt == Format.Q4_0:
        scale = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
        least, (first, last) = torch.zeros_like(scale), (-8, 7)
    else:
        least = groups.amin(2, keepdim=True)
        scale, (first, last) = (groups.amax(2, keepdim=True) - least) / 15, (0, 15)
    steps = ((groups - least) * (1 / scale) + 0.5).nan_to_num(0).floor().clamp(first, last)
    return (steps * scale.half().float() + least.half().float()).view_as(weight)


@pytest.mark.parametrize("fmt", [Format.Q4_0, Format.Q4_1])
@pytest.mark.parametrize("kind", ["normal", "sparse", "outliers", "bf16"])
def test_no_group_is_worse_off_than_rounded_to_nearest(fmt: Format, kind: str) -> None:
    weight = torch.randn(512, 512)
    if kind == "sparse":
        weight *= torch.rand_like(weight) < 2 / GROUP
    if kind == "outliers":
        weight *= torch.where(torch.rand_like(weight) < 1 / 64, 1000.0, 1.0)
    if kind == "bf16":
        weight = weight.bfloat16().float()

    def errors(packed: Tensor) -> Tensor:
        return (packed - weight).square().view(512, -1, GROUP).sum(2)

    ours = errors(unpack(pack(weight, fmt), 512, 512, fmt))
    nearest = errors(rounded_to_nearest(weight, fmt))
    assert (ours <= nearest * 1.001 + 1e-9).all()
    if kind == "normal":
        torch.testing.assert_close(ours, nearest, rtol=1e-3, atol=1e-9)


def test_large_weights_are_packed_in_parts() -> None:
    weight = torch.randn(5000, 1000)  # more than one part, and no whole number of panels
    for fmt in (Format.BF16, Format.INT8, Format.Q4_1):
        whole = pack(weight, fmt)
        last = unpack(pack(weight[-40:], fmt), 40, 1000, fmt)
        assert torch.equal(unpack(whole, 5000, 1000, fmt)[-40:], last)


@pytest.mark.parametrize("fmt", list(Format))
def test_refuses_weights_that_are_not_packed_for_it(fmt: Format) -> None:
    packed = pack(torch.randn(16, 64), fmt)
    wrong = [
        (torch.randn(1, 130), packed, int(fmt)),
        (torch.randn(1, 64), torch.randn(16, 64), int(fmt)),
        (torch.randn(1, 64), packed[:, :-1], int(fmt)),
    ]
    for x, weight, code in wrong:
        with pytest.raises(RuntimeError, match="packed as"):
            torch.ops.precast.linear(x, weight, None, 16, code)


def test_refuses_a_format_that_there_is_not() -> None:
    packed = pack(torch.randn(16, 64), Format.FP32)
    for code in (-1, 16, 1 << 40):
        with pytest.raises(RuntimeError, match="no weight format"):
            torch.ops.precast.linear(torch.randn(1, 64), packed, None, 16, code)


@pytest.mark.parametrize("fmt", list(Format))
@pytest.mark.parametrize("count", [1, 30])
def test_embedding_takes_rows_of_a_packed_weight(fmt: Format, count: int) -> None:
    packed = pack(torch.randn(77, 70), fmt)
    ids = torch.randint(77, (count,))
    rows = torch.ops.precast.embedding(ids, packed, 70, int(fmt))
    torch.testing.assert_close(rows, unpack(packed, 77, 70, fmt)[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", [-1, 32, 1 << 40])
def test_embedding_refuses_rows_that_there_are_not(row: int) -> None:
    packed = pack(torch.randn(20, 8), Format.INT8)
    with pytest.raises(RuntimeError, match=f"no row {row}"):
        torch.ops.precast.embedding(torch.tensor([row]), packed, 8, int(Format.INT8))


@pytest.mark.parametrize("fmt", [Format.Q4_1, Format.INT8, Format.BF16])
@pytest.mark.parametrize("threads", [1, 3])
def test_packing_in_parts_gives_the_bytes_of_the_parts(fmt: Format, threads: int) -> None:
    """More than is packed at a time, by one thread and by several."""
    weight = torch.randn(16 * 150 + 5, 576, generator=torch.Generator().manual_seed(1))
    native.start_threads((-1,) * threads)
    try:
        with torch.inference_mode():
            parts = [pack(part, fmt) for part in weight.split(16)]
            assert torch.equal(pack(weight, fmt), torch.cat(parts))
    finally:
        native.start_threads((-1, -1))
