"""Weights of GGUF files as they are: their values, and products with them."""

import pytest
import torch

from precast.ops import native
from precast.ops.gguf_blocks import RawRows, values_of
from precast.ops.gguf_types import BLOCKS, PLAIN, GgufType, packed_row_bytes
from precast.ops.packing import Format
from tests.support.gguf_kernels import QUANTIZED, meant, packed, random_rows, wrong_values

ops = torch.ops.precast
MIXED = int(Format.MIXED)


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


def test_every_type_has_the_values_of_the_file() -> None:
    assert list(wrong_values()) == []


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_and_inputs_that_are_multiples_of_nothing(kind: GgufType) -> None:
    inputs = BLOCKS[kind].inputs
    for rows, columns in [(1, inputs), (17, 3 * inputs), (50, 5 * inputs)]:
        raw = random_rows(kind, rows, columns)
        x = torch.randn(75, columns)
        whole = packed([raw])
        values = ops.unpack(torch.arange(rows), whole, columns, MIXED)
        assert torch.equal(values, values_of(raw))
        one = ops.linear(x[2:3], whole, None, rows, MIXED)
        for few in (6, 9, 75):  # tiles of rows, and weights that are unpacked for all of them
            assert torch.equal(ops.linear(x[:few], whole, None, rows, MIXED)[2:3], one)
        last = ops.linear(x, whole, None, rows, MIXED)[74:]
        assert torch.equal(last, ops.linear(x[74:], whole, None, rows, MIXED))
        close = 0.1 * float(one.norm())
        torch.testing.assert_close(one, x[2:3] @ values.T, rtol=0.0, atol=close)


def test_two_bits_are_off_by_little() -> None:
    raw = random_rows(GgufType.Q2_K, 40, 512)
    exact = meant(raw)
    error = (values_of(raw) - exact).view(40, -1, 32).abs().amax(dim=2)
    largest = exact.view(40, -1, 32).abs().amax(dim=2)
    assert (error <= largest / 254 * 1.01 + largest * 2**-10).all()


def test_parts_are_computed_as_if_they_were_alone() -> None:
    """Rows, biases and bits; of formats whose groups are padded differently."""
    kinds = [GgufType.Q4_K, GgufType.Q6_K, GgufType.F16, GgufType.MXFP4, GgufType.Q8_0]
    raws = [random_rows(kind, 20 + 7 * index, 768) for index, kind in enumerate(kinds)]
    sizes = [raw.rows.shape[0] for raw in raws]
    bias, whole = torch.randn(sum(sizes)), packed(raws)
    for count in (1, 3, 18):
        x = torch.randn(count, 768)
        together = ops.linear(x, whole, bias, sum(sizes), MIXED).split(sizes, dim=1)
        for raw, added, found in zip(raws, bias.split(sizes), together, strict=True):
            assert torch.equal(found, ops.linear(x, packed([raw]), added, len(added), MIXED))
    rows = ops.embedding(torch.tensor([0, 19, 20, 46, 100]), whole, 768, MIXED)
    all_rows = torch.cat([values_of(raw) for raw in raws])
    assert torch.equal(rows, all_rows[[0, 19, 20, 46, 100]])


def test_parts_have_the_bits_of_the_formats_that_they_are() -> None:
    raw = random_rows(GgufType.Q4_0, 64, 256)
    alone = torch.empty((4, int(ops.panel_bytes(int(Format.Q4_0), 256))), dtype=torch.uint8)
    ops.pack_gguf(raw.rows, int(raw.type), 256, alone)
    x = torch.randn(9, 256)
    assert torch.equal(
        ops.linear(x, packed([raw]), None, 64, MIXED),
        ops.linear(x, alone, None, 64, int(Format.Q4_0)),
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_extremes_do_not_saturate(kind: GgufType, sign: float) -> None:
    """Inputs of full size whose signs follow the weights', so that every product adds up."""
    raw = random_rows(kind, 16, 512)
    values = values_of(raw)
    for row in (0, 5):
        x = torch.sign(values[row : row + 1]) * sign
        got = ops.linear(x, packed([raw]), None, 16, MIXED)
        assert torch.allclose(got, x @ values.T, rtol=1e-4, atol=float(values.abs().max()) * 1e-2)
        many = ops.linear(x.expand(17, -1), packed([raw]), None, 16, MIXED)
        assert torch.equal(many, got.expand(17, -1))


@pytest.mark.parametrize("kind", [GgufType.Q4_K, GgufType.Q5_0, GgufType.F16])
def test_columns_are_cut_between_blocks_only(kind: GgufType) -> None:
    raw, inputs = random_rows(kind, 24, 1024), BLOCKS[kind].inputs
    cut = raw.cut(inputs, 3 * inputs)
    assert cut is not None
    assert torch.equal(values_of(cut), values_of(raw)[:, inputs : 3 * inputs])
    assert kind in PLAIN or raw.cut(inputs // 2, inputs) is None


@pytest.mark.parametrize("kind", list(GgufType))
def test_packed_sizes_are_told_without_torch(kind: GgufType) -> None:
    columns = 5 * 256
    raw = random_rows(kind, 16, columns)
    told = 16 * packed_row_bytes(kind, columns)
    assert told == int(ops.panel_bytes(raw.format, columns))


@pytest.mark.parametrize("kind", list(GgufType))
def test_scales_that_are_no_numbers_are_noticed(kind: GgufType) -> None:
    raw = random_rows(kind, 16, 256)
    rows = raw.rows.clone()
    at = (BLOCKS[kind].scales or (0,))[-1]
    size = {GgufType.F32: 4, GgufType.MXFP4: 1}.get(kind, 2)
    rows[3, at : at + size] = 255
    out = torch.empty((1, int(ops.panel_bytes(raw.format, 256))), dtype=torch.uint8)
    assert ops.pack_gguf(raw.rows, int(kind), 256, out)
    assert not ops.pack_gguf(rows, int(kind), 256, out)


def test_a_weight_of_another_size_is_refused() -> None:
    whole = packed([random_rows(GgufType.Q4_K, 16, 256)])
    x = torch.randn(1, 256)
    for weight, rows, message in [
        (whole, 17, "16 rows, not 17"),
        (whole[:, :-64], 16, "too short"),
        (torch.zeros_like(whole), 16, "no header"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.linear(x, weight.contiguous(), None, rows, MIXED)
    with pytest.raises(RuntimeError, match="256 columns, not 128"):
        ops.linear(x[:, :128].contiguous(), whole, None, 16, MIXED)
    with pytest.raises(RuntimeError, match="no row 16"):
        ops.embedding(torch.tensor([16]), whole, 256, MIXED)
    with pytest.raises(RuntimeError, match="rows must be uint8"):
        ops.pack_gguf(torch.zeros(16, 10, dtype=torch.uint8), 12, 256, whole)


def test_raw_rows_may_lie_apart() -> None:
    raw = random_rows(GgufType.Q6_K, 20, 512)
    wide = torch.zeros((20, raw.rows.shape[1] + 30), dtype=torch.uint8)
    wide[:, : raw.rows.shape[1]] = raw.rows
    apart = RawRows(raw.type, 512, wide[:, : raw.rows.shape[1]])
    assert torch.equal(values_of(apart), values_of(raw))
