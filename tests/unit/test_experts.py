"""The experts operator: only what was chosen, whoever else is in the batch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from precast.ops import native
from precast.ops.packing import Format, pack

EXPERTS, PER_TOKEN, HIDDEN, SIZE = 5, 2, 48, 20
FORMATS = [Format.FP32, Format.INT8, Format.Q4_0]


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


def packed(fmt: Format) -> tuple[Tensor, Tensor]:
    gate_up = [pack(torch.randn(2 * SIZE, HIDDEN) / 7, fmt) for _ in range(EXPERTS)]
    down = [pack(torch.randn(HIDDEN, SIZE) / 4, fmt) for _ in range(EXPERTS)]
    return torch.stack(gate_up), torch.stack(down)


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.rand(tokens, EXPERTS).topk(PER_TOKEN).indices
    return torch.randn(tokens, HIDDEN), chosen, torch.rand(tokens, PER_TOKEN)


def one_by_one(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, fmt: Format
) -> Tensor:
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for expert, weight in sorted(zip(chosen[row].tolist(), weights[row].tolist(), strict=True)):
            both = torch.ops.precast.linear(x[row, None], gate_up[expert], None, 2 * SIZE, fmt)
            inner = silu(both[:, :SIZE]) * both[:, SIZE:]
            out[row] += weight * torch.ops.precast.linear(inner, down[expert], None, HIDDEN, fmt)[0]
    return out


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_agrees_with_one_expert_after_the_other(fmt: Format, tokens: int) -> None:
    weights, step = packed(fmt), inputs(tokens)
    actual = torch.ops.precast.fused_experts(*step, *weights, SIZE, int(fmt))
    expected = one_by_one(*step, *weights, fmt)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_nobody_chose_do_not_matter() -> None:
    gate_up, down = packed(Format.FP32)
    x, chosen, weights = inputs(4)
    chosen = chosen.clamp(max=2)
    whole = torch.ops.precast.fused_experts(x, chosen, weights, gate_up, down, SIZE, 0)
    gate_up[3:], down[3:] = 255, 255  # NaN
    rest = torch.ops.precast.fused_experts(x, chosen, weights, gate_up, down, SIZE, 0)
    assert torch.equal(whole, rest)


def test_the_fake_is_like_the_operator() -> None:
    torch.library.opcheck(
        torch.ops.precast.fused_experts.default,
        (*inputs(3), *packed(Format.FP32), SIZE, int(Format.FP32)),
    )


def test_an_expert_that_there_is_not() -> None:
    x, chosen, weights = inputs(2)
    chosen[1, 0] = EXPERTS
    with pytest.raises(RuntimeError, match="no expert 5 among 5"):
        torch.ops.precast.fused_experts(x, chosen, weights, *packed(Format.FP32), SIZE, 0)
