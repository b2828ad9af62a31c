"""Where a token's bits depend on what else is in its step.

``python -m tests.support.same_bits`` prints the trials that failed, one a line, for the instruction
set that ``PRECAST_NATIVE_ISA`` names.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from precast.graphs.capture.export import random_cache, verification_plan
from precast.models.forward import hidden_states, logits
from precast.models.kv_cache import LayerCache
from precast.models.layers import Paging, Shape
from precast.models.load import Weights, random_weights
from precast.models.options import (
    Gemma3Options,
    LlamaOptions,
    Options,
    Qwen3MoeOptions,
    WindowOptions,
)
from precast.models.shape import ModelShape
from precast.ops import native
from precast.ops.gguf_types import GgufType
from precast.ops.packing import Format, pack
from tests.support import gguf_kernels

ops = torch.ops.precast
ROWS = 70
COUNTS = (2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 64, 65)
VOCABULARY, BLOCK, POSITIONS = 150, 16, 256
PROMPT, SEQUENCES = 45, 4
BLOCKS_EACH = 3
LARGEST_CHUNKS = (1, 3, 17, PROMPT)
"""Of a schedule each."""
OPTIONS: dict[str, Options] = {
    "llama": LlamaOptions(attention_bias=True, mlp_bias=True),
    "phi3": WindowOptions(kinds=("sliding",), window=12, rotary_dim=8),
    "gemma3": Gemma3Options(
        kinds=("sliding", "full"), window=12, query_scale=0.2, logit_softcap=30.0, ropes=2
    ),
    "qwen3_moe": Qwen3MoeOptions(
        kinds=("moe", "dense"), experts=5, experts_per_token=2, expert_size=40, normalize=True
    ),
}
PRECISIONS = [
    ("int8", "bf16"),
    ("q4_1", "bf16"),
    ("none", "bf16"),
    ("q8_0", "int8"),
    ("file", "bf16"),
]
Operator = Callable[..., Tensor]


def failures() -> list[str]:
    """All trials that failed."""
    found = []
    for threads in (1, 3):
        native.start_threads((-1,) * threads)
        found += [f"{name}, {threads} threads" for name in operator_failures()]
        found += [f"{name}, {threads} threads" for name in gguf_kernels.wrong_values()]
    native.start_threads((-1, -1))
    return [*found, *model_failures()]


def operator_failures() -> Iterator[str]:
    """Operators that give a row other bits in some number of rows than alone."""
    torch.manual_seed(0)
    for name, operator, inputs in _operators():
        alone = torch.cat([operator(*(x[row, None] for x in inputs)) for row in range(ROWS)])
        for count in COUNTS:
            first = ROWS - count
            together = operator(*(x[first:].contiguous() for x in inputs))
            if not torch.equal(together, alone[first:]):
                yield f"{name} of {count} rows"


def _operators() -> Iterator[tuple[str, Operator, Sequence[Tensor]]]:
    x = torch.randn(ROWS, 90)
    for fmt in Format:
        packed, bias = pack(torch.randn(100, 90), fmt), torch.randn(100)
        yield fmt.name, lambda x, w=packed, f=fmt: ops.linear(x, w, None, 100, int(f)), [x]
        yield (
            f"{fmt.name} with bias",
            lambda x, w=packed, b=bias, f=fmt: ops.linear(x, w, b, 100, int(f)),
            [x],
        )
        yield from _experts(fmt)
    wide = torch.randn(ROWS, 512)
    for kind in GgufType:
        parts = [(kind, 53), (GgufType.Q6_K, 20)]
        weight = gguf_kernels.packed([gguf_kernels.random_rows(*part, 512) for part in parts])
        yield (
            f"a file's {kind.name}",
            lambda x, w=weight: ops.linear(x, w, None, 73, int(Format.MIXED)),
            [wide],
        )
    yield "rms_norm", lambda x: ops.rms_norm(x, torch.ones(90), 1e-5), [x]
    yield "silu_and_mul", ops.silu_and_mul, [x]
    yield "gelu_tanh_and_mul", ops.gelu_tanh_and_mul, [x]
    yield "soft_cap", lambda x: ops.soft_cap(x, 1.0), [x]
    yield "route", lambda x: ops.route(x, 7, True)[1], [x]
    yield "rotary", ops.rotary, [x.view(ROWS, 3, 30), torch.rand(ROWS, 9), torch.rand(ROWS, 9)]


def _experts(fmt: Format) -> Iterator[tuple[str, Operator, Sequence[Tensor]]]:
    gate_up = torch.stack([pack(torch.randn(2 * 24, 90), fmt) for _ in range(5)])
    down = torch.stack([pack(torch.randn(90, 24), fmt) for _ in range(5)])
    chosen, likes = ops.route(torch.randn(ROWS, 5), 2, True)
    yield (
        f"{fmt.name} experts",
        lambda x, ids, w: ops.fused_experts(x, ids, w, gate_up, down, 24, int(fmt)),
        [torch.randn(ROWS, 90), chosen, likes],
    )


# ---- models: one prompt's logits, whatever runs beside it and however it is cut


def shape(architecture: str, quantization: str, kv_dtype: str) -> Shape:
    return ModelShape(
        architecture=architecture,
        hidden_size=96,
        query_groups=(2, 2),
        head_dim=16,
        intermediate_size=80,
        vocab_widths=(VOCABULARY,),
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-5,
        options=OPTIONS[architecture],
        weight_dtype="fp32",
        quantization=quantization,
        head_quantization=quantization,
        kv_dtype=kv_dtype,
    )


@dataclass(kw_only=True)
class Model:
    shape: Shape
    weights: Weights
    prompts: list[Tensor]
    """int64 [PROMPT] each; the first one is watched."""
    caches: list[LayerCache] = field(default_factory=list)


Chunks = list[tuple[int, range]]
"""A step: sequences and their tokens."""
Step = Callable[[Tensor, Tensor, Paging, Tensor], Tensor]
"""Ids, positions, paging and the rows that are wanted, to those rows' logits."""


def new_model(architecture: str, quantization: str, kv_dtype: str) -> Model:
    generator = torch.Generator().manual_seed(1)
    own = shape(architecture, quantization, kv_dtype)
    plan = verification_plan(own, 2)
    return Model(
        shape=own,
        weights=random_weights(own, plan, POSITIONS, generator),
        prompts=list(torch.randint(VOCABULARY, (SEQUENCES, PROMPT), generator=generator)),
        caches=[random_cache(own, BLOCK, generator, SEQUENCES * BLOCKS_EACH) for _ in plan],
    )


def eager(model: Model, padding: int = 0) -> Step:
    """Steps with ``padding`` tokens behind them that no sequence has."""

    def step(ids: Tensor, at: Tensor, paging: Paging, rows: Tensor) -> Tensor:
        more = torch.zeros(padding, dtype=torch.int64)
        unused = torch.full((padding,), -1, dtype=torch.int32)
        hidden = hidden_states(
            model.shape,
            model.weights,
            model.caches,
            torch.cat((ids, more)),
            torch.cat((at, more)),
            paging._replace(slots=torch.cat((paging.slots, unused))),
        )
        return logits(model.shape, model.weights, hidden[rows])

    return step


def watched(model: Model, steps: Sequence[Chunks], run: Step) -> Tensor:
    """Logits [PROMPT, VOCABULARY] of the first prompt."""
    parts = []
    with torch.inference_mode():
        for chunks in steps:
            ids = torch.cat([model.prompts[of][own.start : own.stop] for of, own in chunks])
            at = torch.tensor([position for _, own in chunks for position in own])
            first = next(i for i, (of, _) in enumerate(chunks) if of == 0)
            begin = sum(len(own) for _, own in chunks[:first])
            rows = torch.arange(begin, begin + len(chunks[first][1]))
            parts.append(run(ids, at, paging(chunks), rows))
    return torch.cat(parts)


def paging(chunks: Chunks) -> Paging:
    tables = [[of * BLOCKS_EACH + i for i in range(BLOCKS_EACH)] for of, _ in chunks]
    slots = [of * BLOCKS_EACH * BLOCK + at for of, own in chunks for at in own]
    starts = list(accumulate((len(own) for _, own in chunks), initial=0))
    lengths = [own.stop for _, own in chunks]
    ints = (slots, starts, lengths, tables)
    return Paging(*(torch.tensor(values, dtype=torch.int32) for values in ints))


def alone() -> list[Chunks]:
    return [[(0, range(PROMPT))]]


def crowded(seed: int, largest: int) -> list[Chunks]:
    """The first prompt in chunks of up to ``largest`` tokens, each at a random place among chunks
    of some of the others."""
    draw = random.Random(seed)
    done, steps = [0] * SEQUENCES, []
    while done[0] < PROMPT:
        step = []
        for of in draw.sample(range(SEQUENCES), SEQUENCES):
            size = draw.randint(1, largest) if of == 0 or draw.random() < 0.7 else 0
            size = min(size, PROMPT - done[of])
            if size:
                step.append((of, range(done[of], done[of] + size)))
            done[of] += size
        steps.append(step)
    return steps


def model_failures() -> Iterator[str]:
    for architecture in OPTIONS:
        for quantization, kv_dtype in PRECISIONS:
            model = new_model(architecture, quantization, kv_dtype)
            expected = watched(model, alone(), eager(model))
            for seed, largest in enumerate(LARGEST_CHUNKS):
                steps = crowded(seed, largest)
                if not torch.equal(watched(model, steps, eager(model, 3 * seed)), expected):
                    yield f"{architecture}, {quantization} with {kv_dtype} cache, schedule {seed}"


if __name__ == "__main__":
    print("\n".join(failures()))
