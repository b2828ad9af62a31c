"""A tiny model's graph through the real capture program: compiled, verified, signed, fetched."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from precast.graphs.factors import needs_of, rank_factors
from precast.graphs.failure import read_mismatch
from precast.graphs.fetch import GraphCache, fetch_graph
from precast.graphs.signing import TrustedKeys
from precast.graphs.v1 import graphs_service_pb2 as pb
from precast.models.options import LlamaOptions
from precast.models.shape import ModelShape
from precast.ops import providers
from services.compile_worker import fork_server
from tests.support.capture import BUILD_DIR, run_capture
from tests.support.compile_worker import WorkerProcess, compile_worker, connect

SHAPE = ModelShape(
    architecture="llama",
    hidden_size=64,
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_widths=(256,),
    vocab_size=256,
    rms_norm_eps=1e-5,
    options=LlamaOptions(),
    weight_dtype="fp32",
    quantization="int8",
    head_quantization="int8",
    kv_dtype="fp32",
)
"""Small enough that nearly all of the time goes into the compiler's fixed cost."""


def tiny_spec(batch_size: int = 2) -> dict[str, str]:
    factors = rank_factors(SHAPE, block_size=32, torch_version=str(torch.__version__))
    return {**factors, "batch_size": str(batch_size)}


@pytest.mark.asyncio
@pytest.mark.timeout(400)
async def test_graph_of_a_tiny_model(tmp_path: Path, redis_url: str) -> None:
    spec = tiny_spec()
    stale = {**spec, "graph_source": "0123456789abcdef"}
    with compile_worker(tmp_path / "home", redis_url) as worker:
        async with connect(worker) as client:
            states = await client.request(spec, stale)
            phases = (pb.GRAPH_PHASE_PUBLISHED, pb.GRAPH_PHASE_FAILED)
            done = await client.until([state.key for state in states], *phases, deadline_s=360)
            good, refused = (done[state.key] for state in states)
            assert good.phase == pb.GRAPH_PHASE_PUBLISHED, good.error
            assert "graph_source is 0123456789abcdef" in refused.error
            server = fork_server_of(worker)
            assert server.num_threads() == 1  # a fork beside threads may hang
            trusted = TrustedKeys.load(worker.home / "keys" / "trusted")
            cache = GraphCache(tmp_path / "cache", trusted)
            graph = await fetch_graph(client.graphs, cache, good.key, spec=spec)
    assert 0 < good.max_relative_error < 3e-2
    assert good.layer_us > 0
    assert good.capture_s > 1
    with zipfile.ZipFile(graph.graph_path) as package:
        assert any(name.endswith(".so") for name in package.namelist())
    assert "g++" in graph.manifest.compiler
    assert not list((worker.home / "captures").iterdir())
    leaves_no_files_behind(graph.graph_path, tmp_path / "temporary")


def fork_server_of(worker: WorkerProcess) -> psutil.Process:
    children = psutil.Process(worker.process.pid).children()
    return next(child for child in children if fork_server.__name__ in child.cmdline())


def leaves_no_files_behind(package: Path, folder: Path) -> None:
    """A process that has loaded a graph may be killed at any time."""
    folder.mkdir()
    program = f"""
import os, torch
from pathlib import Path
from precast.graphs import capture_models as models
from precast.graphs.replay import Graph
from precast.models.weights import random_weights
from tests.integration.test_real_capture import SHAPE
generator = torch.Generator().manual_seed(0)
plan = models.verification_plan(SHAPE, 2)
weights = random_weights(SHAPE, plan, 64, generator)
caches = [models.random_cache(SHAPE, 32, generator) for _ in plan]
graph = Graph(Path({str(package)!r}), 2, SHAPE, weights, caches)
inputs = models.decode_inputs(SHAPE, 32, [3, 4], generator)
graph.replay(inputs.token_ids, inputs.positions, inputs.paging)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "TMPDIR": str(folder)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120)
    assert run.returncode == -9
    assert list(folder.iterdir()) == []


WRONG = """
import sys
from precast.graphs import capture, capture_models
right, calls = capture_models.eager_step, []

def wrong(*arguments, **named):
    out = right(*arguments, **named)
    calls.append(1)
    if len(calls) == 2:
        out[0, 9] += 10 * out.abs().max()
    return out

capture_models.eager_step = wrong
sys.exit(capture.main())
"""


@pytest.mark.timeout(400)
def test_graph_that_differs_from_eager_is_kept_with_its_inputs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRONG, "--out", str(tmp_path), "--kept", str(BUILD_DIR)],
        input=json.dumps(tiny_spec()),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 3, done.stderr[-2000:]
    assert not (tmp_path / "report.json").exists()
    found = read_mismatch(tmp_path)
    assert found
    assert (found.output, found.index) == ("logits", (0, 9))
    assert found.text in done.stderr
    assert found.expected is not None
    assert found.actual is not None
    assert found.differences["logits"] > 0.5 > found.bound > found.differences["keys of layer 0"]
    tensors = load_file(tmp_path / "failure" / "tensors.safetensors")
    assert tensors["expected"][9] == found.expected
    assert tensors["actual"][9] == found.actual
    assert tuple(tensors["context_lens"].tolist()) == found.context_lens
    assert {"token_ids", "positions", "slots", "block_tables"} <= tensors.keys()


@pytest.mark.asyncio
@pytest.mark.timeout(400)
async def test_graphs_of_several_providers(tmp_path: Path, redis_url: str) -> None:
    """Another provider's operators are called through the dispatcher, where its kernels are. What a
    fork after another provider's makes is to the byte what a process of its own makes."""
    providers.start(providers.select("reference", needs_of(SHAPE)))
    try:
        other = tiny_spec()
    finally:
        providers.start(providers.select("native", needs_of(SHAPE)))
    native = tiny_spec()
    assert (other["provider"], native["provider"]) == ("reference", "native")
    mixed = {**other, "provider_abi": "1:linear"}
    with compile_worker(tmp_path / "home", redis_url) as worker:
        async with connect(worker) as client:
            states = await client.request(other, native, mixed)
            phases = (pb.GRAPH_PHASE_PUBLISHED, pb.GRAPH_PHASE_FAILED)
            done = await client.until([state.key for state in states], *phases, deadline_s=360)
    called, direct, refused = (done[state.key] for state in states)
    assert 0 <= called.max_relative_error < 3e-2, called.error
    assert called.phase == direct.phase == pb.GRAPH_PHASE_PUBLISHED, called.error + direct.error
    assert "provider_abi is 1:linear, but " in refused.error
    published = worker.home / "store" / direct.key / "1" / "graph.pt2"
    assert published.read_bytes() == captured_by_hand(native, tmp_path / "hand").read_bytes()


def captured_by_hand(spec: dict[str, str], folder: Path) -> Path:
    """In another folder, by a process that has done nothing before, without parts of others."""
    folder.mkdir()
    (folder / "kept").mkdir()
    (folder / "kept" / "objects").symlink_to(BUILD_DIR / "objects")
    done = run_capture(spec, folder, folder / "kept")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "graph.pt2"
