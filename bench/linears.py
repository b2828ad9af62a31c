"""Linears alone: the native kernel in every weight format against torch's best, alternating.

    python -m bench.linears [--shapes 2048x8192,576x1536] [--rows 1,16,64] [--types q4_k,q6_k]

``--types``: of GGUF files, whose blocks hold random bits, run as they are.

Each timed run goes over copies of the weights that together exceed the caches, as a model's layers
do. Prints medians: GB/s of weights (and their share of what plain reading gives, in turn with
them), and billions of operations a second. fp32 is ``torch.nn.functional.linear``; fbgemm is
``quantized::linear_dynamic``, torch's int8 with dynamic activations.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from precast.ops import native
from precast.ops.gguf_blocks import RawRows, pack_raw
from precast.ops.gguf_types import BLOCKS, PLAIN, ROUNDED, GgufType, row_bytes
from precast.ops.mixed import MixedPart, mixed_size, write_parts
from precast.ops.packing import Format, pack
from precast.system.memory import Arena
from precast.system.process import available_cpus, pin

WORKING_SET = 192 << 20
ROUNDS = 9
FORMATS = [fmt for fmt in Format if fmt != Format.MIXED]
TYPES = [
    kind
    for kind in GgufType
    if kind not in (*PLAIN, *ROUNDED) and kind.name not in Format.__members__
]
"""Those that have no format of their own in ``FORMATS``."""
SETTLE_S = 0.02
"""Before each run: torch's threads go on spinning for milliseconds after their last one."""

Run = Callable[[], object]


def native_run(weight: Tensor, x: Tensor, fmt: Format) -> tuple[Run, int, int]:
    """One pass over all copies, their number, and the bytes of one."""
    packed, arena = pack(weight, fmt), Arena()
    copies = [arena.copy(packed) for _ in range(-(-WORKING_SET // packed.nbytes))]

    def run() -> None:
        for copy in copies:
            torch.ops.precast.linear(x, copy, None, weight.shape[0], int(fmt))

    return run, len(copies), packed.nbytes


def file_run(n: int, x: Tensor, kind: GgufType) -> tuple[Run, int, int]:
    """As ``native_run``, of a GGUF file's blocks."""
    k, arena = x.shape[1], Arena()
    raw = random_blocks(n, k, kind)
    parts = [MixedPart(raw.format, n)]
    packed = torch.empty(mixed_size(parts, k), dtype=torch.uint8)
    pack_raw(raw, write_parts(packed, parts, k)[0])
    copies = [arena.copy(packed) for _ in range(-(-WORKING_SET // packed.nbytes))]

    def run() -> None:
        for copy in copies:
            torch.ops.precast.linear(x, copy, None, n, int(Format.MIXED))

    return run, len(copies), packed.nbytes


def random_blocks(n: int, k: int, kind: GgufType) -> RawRows:
    """Any bits, with scales of about 0.01."""
    block = BLOCKS[kind]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (n, row_bytes(kind, k)), generator=generator, dtype=torch.uint8)
    blocks = rows.view(-1, block.nbytes)
    for at in block.scales:
        scales = torch.rand(len(blocks), generator=generator).mul_(0.01).half()
        blocks[:, at : at + 2] = scales.view(torch.uint8).view(-1, 2)
    if kind == GgufType.MXFP4:
        blocks[:, 0] = 120
    return RawRows(kind, k, rows)


def fp32_run(weight: Tensor, x: Tensor) -> tuple[Run, int, int]:
    arena = Arena()
    copies = [arena.copy(weight) for _ in range(-(-WORKING_SET // weight.nbytes))]

    def run() -> None:
        for copy in copies:
            torch.nn.functional.linear(x, copy)

    return run, len(copies), weight.nbytes


def fbgemm_run(weight: Tensor, x: Tensor) -> tuple[Run, int, int]:
    scales = weight.abs().amax(dim=1).double() / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    count = -(-WORKING_SET // weight.numel())
    copies = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(count)]

    def run() -> None:
        for copy in copies:
            torch.ops.quantized.linear_dynamic(x, copy)

    return run, count, weight.numel()


def candidates(
    n: int, k: int, rows: int, formats: Sequence[Format], types: Sequence[GgufType]
) -> Iterator[tuple[str, Run, int, int, bool]]:
    """Name, run, copies, bytes of one, and whether the run uses torch's threads."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    x = torch.randn(rows, k, generator=generator)
    for fmt in formats:
        yield (f"native {fmt.name.lower()}", *native_run(weight, x, fmt), False)
    for kind in types:
        yield (f"file's {kind.name.lower()}", *file_run(n, x, kind), False)
    if Format.FP32 in formats:
        yield ("torch fp32", *fp32_run(weight, x), True)
    torch.backends.quantized.engine = "fbgemm"
    yield ("torch fbgemm int8", *fbgemm_run(weight, x), True)


def timed(run: Run, cores: tuple[int, ...], torch_threads: bool) -> float:
    # Torch's threads inherit the caller's cores when they are made: pinned like ours, both of them
    # would share one, and fbgemm took eight times as long.
    pin(cores if torch_threads else cores[:1])
    torch.set_num_threads(len(cores) if torch_threads else 1)
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="2048x8192,576x1536", help="inputs x outputs")
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--formats", default=",".join(f.name.lower() for f in FORMATS))
    parser.add_argument("--types", default=",".join(t.name.lower() for t in TYPES))
    arguments = parser.parse_args()
    types = [GgufType[name.upper()] for name in arguments.types.split(",") if name]
    formats = [Format[name.upper()] for name in arguments.formats.split(",") if name]
    cores = available_cpus()
    native.start_threads(cores)
    words = Arena().empty((WORKING_SET,)).view(torch.int64).fill_(1)
    reads: list[float] = []
    table = Table("linear", "rows", "kernel", "GB/s", "of read", "GOPS")
    with torch.inference_mode():
        for shape in arguments.shapes.split(","):
            k, n = map(int, shape.split("x"))
            for rows in map(int, arguments.rows.split(",")):
                entries = list(candidates(n, k, rows, formats, types))
                runs = [partial(timed, run, cores, mine) for _, run, _, _, mine in entries]
                runs.append(
                    partial(timed, lambda: torch.ops.precast.read_memory(words), cores, False)
                )
                samples = [[run() for run in runs] for _ in range(ROUNDS + 1)][1:]
                reads += [sample[-1] for sample in samples]
                bandwidth = words.nbytes / statistics.median(sample[-1] for sample in samples)
                for index, (name, _, copies, size, _) in enumerate(entries):
                    seconds = statistics.median(sample[index] for sample in samples)
                    table.add_row(
                        f"{k} to {n}",
                        str(rows),
                        name,
                        f"{copies * size / seconds / 1e9:.1f}",
                        f"{copies * size / seconds / bandwidth:.0%}" if rows == 1 else "",
                        f"{2 * rows * n * k * copies / seconds / 1e9:.0f}",
                    )
                table.add_section()
    console = Console()
    console.print(
        f"{len(cores)} threads, {native.native_isa()}, "
        f"memory read {words.nbytes / statistics.median(reads) / 1e9:.1f} GB/s"
    )
    console.print(table)


if __name__ == "__main__":
    main()
