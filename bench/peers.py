"""Decode steps and prefill against llama.cpp: same model, same threads, alternating, one run.

    python -m bench.peers --peer-python PATH [--widths 1,4,16,32]

``--peer-python`` is a Python that has llama-cpp-python, best built with
CMAKE_ARGS="-DGGML_NATIVE=ON". Both sides compute one step's logits from token ids; nothing else is
in the times. The peer runs with and without flash attention and repacked weights; its best counts,
chosen anew for each row. Prints medians, their ratio and that of the fastest steps, for 4-bit
(Q4_0, Q4_1) and 8-bit (Q8_0 against per-channel int8) weights, and the share of the memory
bandwidth that the decode step's weights take at width 1.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.decode_step import BLOCK_SIZE, capture, read_bandwidth, smollm2
from precast.graphs import runner as graph_runner
from precast.graphs.runner import Graph
from precast.models.config import load_config
from precast.models.forward import hidden_states, logits
from precast.models.importing.importer import find_built_in, import_model
from precast.models.kv_cache import new_cache
from precast.models.layers import Paging
from precast.models.load import Weights, load_weights
from precast.models.precision import KvDtype
from precast.models.sharding import shard
from precast.ops import native
from precast.system.process import available_cpus

Cores = tuple[int, ...]
MODEL = "smollm2-135m-instruct"
CONTEXT = 128
STEPS = 16
ROUNDS = 4
TRIALS = 3
"""Of each of the peer's variants, in turn, before one is chosen by its fastest step."""
PAIRS = (("q4_0", "q4_0"), ("q4_1", "q4_1"), ("int8", "q8_0"))
"""Our weights against the peer's."""
VARIANTS = ((), ("--flash",), ("--repack",), ("--flash", "--repack"))
"""Ways of running the peer."""


class Peer:
    """llama.cpp in a process of its own (``llama_peer.py``)."""

    def __init__(self, python: str, model: Path, cores: Cores, variant: Sequence[str] = ()) -> None:
        self.variant = " ".join(variant).replace("--", "") or "plain"
        script = Path(__file__).with_name("llama_peer.py")
        cpus = ",".join(map(str, cores))  # this thread is pinned to one, and children inherit that
        command = [python, str(script), str(model), f"--cpus={cpus}", f"--context={CONTEXT}"]
        self._child = subprocess.Popen(
            [*command, *variant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, order: dict[str, object]) -> list[float]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            sys.exit(f"the peer ended with code {self._child.wait()}")
        seconds: list[float] = json.loads(answer)["seconds"]
        return seconds

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(60)


class Precast:
    """A rank's model without its services."""

    def __init__(self, folder: Path, quantization: str, kv_dtype: KvDtype, width: int) -> None:
        config = load_config(folder)
        self.shape = shape = replace(smollm2(quantization), kv_dtype=kv_dtype)
        part = shard(config, 0, 1)
        self.weights: Weights = load_weights(folder, config, part, shape, CONTEXT + 1024)
        self.blocks_a_row = -(-(CONTEXT + STEPS + 1) // BLOCK_SIZE)
        self.caches = [
            new_cache(
                shape.kv_dtype,
                blocks=max(width * self.blocks_a_row, 1024 // BLOCK_SIZE),
                kv_heads=shape.kv_heads,
                block_size=BLOCK_SIZE,
                head_dim=shape.head_dim,
            )
            for _ in range(config.num_layers)
        ]

    def weight_bytes(self) -> int:
        """What a step at width 1 reads."""
        _embed, layers, head = graph_runner.runner_weights(self.weights, self.caches)
        return sum(t.nbytes for t in [*head, *(t for layer in layers for t in layer[2:])])

    def decode(self, graph: Graph, width: int) -> list[float]:
        tables = torch.arange(width * self.blocks_a_row, dtype=torch.int32).view(width, -1)
        tokens = torch.arange(width) + 100
        times = []
        for step in range(STEPS):
            at = CONTEXT + step
            slots = tables[:, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            paging = Paging(
                slots=slots.to(torch.int32),
                query_starts=torch.arange(width + 1, dtype=torch.int32),
                context_lens=torch.full((width,), at + 1, dtype=torch.int32),
                block_tables=tables,
            )
            start = time.perf_counter()
            graph.replay(tokens, torch.full((width,), at), paging)
            times.append(time.perf_counter() - start)
        return times

    def prefill(self, tokens: int) -> list[float]:
        ints = torch.int32
        table = torch.arange(-(-tokens // BLOCK_SIZE), dtype=ints).view(1, -1)
        paging = Paging(
            slots=torch.arange(tokens, dtype=ints),
            query_starts=torch.tensor([0, tokens], dtype=ints),
            context_lens=torch.tensor([tokens], dtype=ints),
            block_tables=table,
        )
        start = time.perf_counter()
        ids, positions = torch.arange(tokens) % 1000 + 10, torch.arange(tokens)
        hidden = hidden_states(self.shape, self.weights, self.caches, ids, positions, paging)
        logits(self.shape, self.weights, hidden[-1:])
        return [time.perf_counter() - start]


def compare(
    ours: Callable[[], list[float]], theirs: Callable[[], list[float]]
) -> tuple[list[float], list[float]]:
    """Seconds of both, called in turn."""
    samples: tuple[list[float], list[float]] = ([], [])
    for round_ in range(ROUNDS + 1):
        for function, seconds in zip((ours, theirs), samples, strict=True):
            values = function()
            if round_ > 0:  # the first warms up
                seconds += values
    return samples


def best(peers: list[Peer], order: dict[str, object]) -> Peer:
    """The one that does it fastest."""
    trials = [[min(peer.ask(order)) for peer in peers] for _ in range(TRIALS)]
    fastest = [min(seconds) for seconds in zip(*trials, strict=True)]
    return peers[fastest.index(min(fastest))]


def rows(
    ours: Precast, peers: list[Peer], graphs: Path, widths: list[int], prefill: int, read: float
) -> Iterator[list[str]]:
    """What was done, tokens a second of both, ratios, our share of the bandwidth, the variant."""
    for width in widths:
        package = capture(ours.shape, width, graphs)
        graph = Graph(package, width, ours.shape, ours.weights, ours.caches)
        order: dict[str, object] = {"decode": width, "steps": STEPS}
        peer = best(peers, order)
        both = compare(partial(ours.decode, graph, width), partial(peer.ask, order))
        share = ours.weight_bytes() / statistics.median(both[0]) / read if width == 1 else None
        yield cells(f"decode {width}", width, both, share, peer)
    peer = best(peers, {"prefill": prefill})
    both = compare(partial(ours.prefill, prefill), partial(peer.ask, {"prefill": prefill}))
    yield cells(f"prefill {prefill}", prefill, both, None, peer)


def cells(
    what: str, tokens: int, both: tuple[list[float], list[float]], share: float | None, peer: Peer
) -> list[str]:
    mine, theirs = map(statistics.median, both)
    return [
        what,
        f"{tokens / mine:.0f}",
        f"{tokens / theirs:.0f}",
        f"{theirs / mine:.2f}",
        f"{min(both[1]) / min(both[0]):.2f}",
        "" if share is None else f"{share:.0%}",
        peer.variant,
    ]


def quantized(python: str, name: str, folder: Path, cores: Cores) -> Path:
    """The demo model's GGUF in another of llama.cpp's types."""
    target = folder / f"{name}.gguf"
    maker = Peer(python, find_built_in(MODEL), cores)
    maker.ask({"quantize": name, "to": str(target)})
    maker.close()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--widths", default="1,4,16,32")
    parser.add_argument("--kv-dtype", default="bf16", help="the peer's has 16 bits")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--only", choices=[ours for ours, _ in PAIRS], help="these weights alone")
    parser.add_argument("--graphs", type=Path, help="keep captured graphs here")
    parser.add_argument("--home", type=Path, default=Path(".precast"))
    arguments = parser.parse_args()
    widths = [int(w) for w in arguments.widths.split(",")]
    cores = available_cpus()
    native.start_threads(cores)
    bandwidth = read_bandwidth()
    table = Table("weights", "what", "tok/s", "llama.cpp", "ratio", "of fastest", "of read", "peer")
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = import_model(MODEL, arguments.home / "models", report=print).path
        graphs = (arguments.graphs or Path(scratch)) / arguments.kv_dtype
        for quantization, theirs in PAIRS:
            if arguments.only not in (None, quantization):
                continue
            gguf = quantized(arguments.peer_python, theirs, Path(scratch), cores)
            peers = [Peer(arguments.peer_python, gguf, cores, v) for v in VARIANTS]
            ours = Precast(folder, quantization, arguments.kv_dtype, max(widths))
            name = f"{quantization} : {theirs}"
            for row in rows(ours, peers, graphs, widths, arguments.prefill, bandwidth):
                table.add_row(name, *row)
                print(name, *row, file=sys.stderr, flush=True)  # it takes a minute or two
            for peer in peers:
                peer.close()
    console = Console()
    console.print(
        f"SmolLM2-135M, KV {arguments.kv_dtype}, {len(cores)} threads, {native.native_isa()}, "
        f"contexts from {CONTEXT}, "
        f"memory read {bandwidth / 1e9:.1f} GB/s"
    )
    console.print(table)


if __name__ == "__main__":
    main()
