"""A model of 1.2 billion parameters: time of a token at batch 1, and the memory that it takes.

    python -m bench.llama_1b [--quantization q4_0,int8] [--graphs FOLDER | --eager]

Llama 3.2 1B's shape with random weights. Writes a checkpoint (bf16, 2.5 GB) into a temporary
folder and loads it as a rank does, in a process of its own each time: the first packs the weights,
the second reads what was kept. Prints both peaks of resident memory, with the bound for them (1.15
times the packed weights, the KV cache and 400 MB), and for the second a decode step, eager and
(unless --eager) by a captured graph, and its share of the memory bandwidth that the same process
showed afterwards.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from bench.decode_step import capture, read_bandwidth
from precast.graphs.runner import runner_weights
from precast.models.config import load_config
from precast.models.layers import Paging
from precast.models.precision import (
    Precision,
    Quantization,
    default_head_quantization,
    default_kv_dtype,
)
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.ops import native
from precast.system.process import available_cpus
from services.decode_worker.ranks.model import Batch, RankModel, load
from services.decode_worker.ranks.protocol import Init

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "eos_token_id": 128001,
}
BLOCK_SIZE: Final = 32
CONTEXT: Final = 128
KV_BLOCKS: Final = 64
STEPS: Final = 30
MARGIN_MB: Final = 400
"""What a process may take beside 1.15 times its packed weights, and its KV cache."""


def write_checkpoint(folder: Path) -> None:
    """A file for each layer, so that no more than a layer is ever in memory."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    hidden, mlp, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 8 * 64
    _save(folder / "head.safetensors", {"model.embed_tokens": (CONFIG["vocab_size"], hidden)})
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for index in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        named = {prefix + name: size for name, size in sizes.items()}
        _save(folder / f"layer-{index}.safetensors", named)
    _save(folder / "norm.safetensors", {"model.norm": (hidden,)})


def _save(path: Path, sizes: dict[str, tuple[int, ...]]) -> None:
    tensors = {
        f"{name}.weight": torch.randn(size).mul_(size[-1] ** -0.5).bfloat16()
        if len(size) > 1
        else torch.ones(size, dtype=torch.bfloat16)
        for name, size in sizes.items()
    }
    save_file(tensors, path)


def precision_of(quantization: Quantization) -> Precision:
    return Precision(
        weight_dtype="bf16",
        quantization=quantization,
        head_quantization=default_head_quantization(quantization),
        kv_dtype=default_kv_dtype("bf16", quantization),
    )


def loaded(folder: Path, packed: Path, quantization: Quantization) -> RankModel:
    cores = available_cpus()
    native.start_threads(cores)
    return load(
        Init(
            model_dir=str(folder),
            packed_dir=str(packed),
            precision=precision_of(quantization),
            tp_rank=0,
            tp_size=1,
            cores=cores,
            kv_blocks=KV_BLOCKS,
            block_size=BLOCK_SIZE,
            max_batch_size=1,
            max_context_length=KV_BLOCKS * BLOCK_SIZE,
            group_id="",
            kernel_provider="native",
        ),
        lambda _done, _total: None,
    )


def one_token() -> Batch:
    blocks = -(-CONTEXT // BLOCK_SIZE)
    return Batch(
        token_ids=torch.tensor([7]),
        positions=torch.tensor([CONTEXT - 1]),
        paging=Paging(
            slots=torch.tensor([CONTEXT - 1], dtype=torch.int32),
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=torch.tensor([CONTEXT], dtype=torch.int32),
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        ),
    )


def median_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(STEPS + 3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def peak_bytes() -> int:
    """This program's peak of resident memory. Not ru_maxrss, which begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(model: RankModel, package: Path | None) -> dict[str, float]:
    """In the process that loaded the model and did nothing else."""
    batch, drawing = one_token(), np.zeros(1, dtype=np.int32)
    found = {"load_s": model.load_s, "eager_s": median_s(lambda: model.step(batch, drawing, 0))}
    if package is not None:
        model.load_graph(1, package)
        found["graph_s"] = median_s(lambda: model.step(batch, drawing, 1))
    _embedding, layers, head = runner_weights(model.weights, model.caches)
    read = [*head, *(tensor for layer in layers for tensor in layer[2:])]
    return {
        **found,
        "peak": peak_bytes(),
        "kv": sum(cache.k.nbytes + cache.v.nbytes for cache in model.caches),
        "read": sum(tensor.nbytes for tensor in read),  # all: the embedding is the head
        "bandwidth": read_bandwidth(),  # last: it takes memory
    }


def in_a_process(arguments: list[str]) -> dict[str, float]:
    program = [sys.executable, "-m", "bench.llama_1b", "--measure", *arguments]
    run = subprocess.run(program, stdout=subprocess.PIPE, check=True, timeout=600)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def row(name: str, first: dict[str, float], second: dict[str, float]) -> list[str]:
    bound = 1.15 * second["read"] + second["kv"] + MARGIN_MB * 1e6
    step_s = second.get("graph_s", second["eager_s"])
    rate = second["read"] / step_s
    return [
        name,
        f"{second['read'] / 1e6:.0f} + {second['kv'] / 1e6:.0f}",
        f"{first['load_s']:.1f}, {second['load_s']:.1f}",
        f"{first['peak'] / 1e6:.0f}, {second['peak'] / 1e6:.0f} ({bound / 1e6:.0f})",
        f"{second['eager_s'] * 1e3:.1f}",
        f"{second['graph_s'] * 1e3:.1f}" if "graph_s" in second else "",
        f"{rate / 1e9:.1f}",
        f"{rate / second['bandwidth']:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quantization", default="q4_0,int8")
    parser.add_argument("--graphs", type=Path, help="keep captured graphs here")
    parser.add_argument("--eager", action="store_true", help="capture nothing")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, packed, quantization, package = arguments.measure
        with torch.inference_mode():
            model = loaded(Path(folder), Path(packed), quantization)
            print(json.dumps(measure(model, Path(package) if package else None)))
        return
    table = Table(
        "weights", "MB + KV", "load s", "peak MB (bound)", "eager ms", "graph ms", "GB/s", "of read"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, packed = Path(scratch) / "model", Path(scratch) / "packed"
        write_checkpoint(folder)
        config = load_config(folder)
        for quantization in arguments.quantization.split(","):
            shape = shape_of(config, shard(config, 0, 1), precision_of(quantization))
            package = ""
            if not arguments.eager:
                package = str(capture(shape, 1, arguments.graphs or Path(scratch) / "graphs"))
            child = [str(folder), str(packed), quantization, package]
            table.add_row(*row(quantization, in_a_process(child), in_a_process(child)))
    title = f"1.2 B parameters, batch 1, {len(available_cpus())} threads, {native.native_isa()}, "
    Console().print(f"{title}first start, second start; load {os.getloadavg()[0]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
