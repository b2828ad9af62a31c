"""A tiny model's graph through the real capture program: compiled, verified, signed, fetched."""

import asyncio
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.fetch import fetch_graph
from precast.graphs.artifacts.signing import TrustedKeys
from precast.graphs.artifacts.store import StoredArtifact
from precast.graphs.capture import entry, export
from precast.graphs.capture.verify.failure import read_mismatch
from precast.graphs.factors import needs_of, rank_factors
from precast.models.options import LlamaOptions
from precast.models.shape import ModelShape
from precast.ops import providers
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from services.compile_worker.sandbox import server as fork_server
from tests.support.capture import BUILD_DIR, run_capture
from tests.support.compile_worker import (
    WorkerProcess,
    compile_worker,
    connect,
    has_captures,
    wait_until,
)
from tests.support.processes import words

SHAPE = ModelShape(
    architecture="llama",
    hidden_size=64,
    query_groups=(3, 1),
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


def tiny_spec(num_tokens: int = 2) -> dict[str, str]:
    factors = rank_factors(SHAPE, block_size=32, torch_version=str(torch.__version__))
    return {**factors, "num_tokens": str(num_tokens)}


def provider_spec(name: str) -> dict[str, str]:
    """The tiny model's, captured with another provider."""
    providers.start(providers.select(name, needs_of(SHAPE)))
    try:
        return tiny_spec()
    finally:
        providers.start(providers.select("native", needs_of(SHAPE)))


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What a compile worker made of its requests."""

    specs: dict[str, dict[str, str]]
    states: dict[str, pb.GraphState]
    graph: StoredArtifact
    """The native one, as a decode worker fetches it."""
    home: Path
    threads: int
    """Of the process that captures are forked from."""


@pytest.fixture(scope="module")
def captured(tiny_home: Path, tiny_redis: str) -> Captured:
    """All graphs that the tests look at, captured once by one compile worker."""
    # in this order: the native one is forked after another provider's
    specs = {"reference": provider_spec("reference"), "native": tiny_spec()}
    specs["stale"] = {**specs["native"], "graph_source": "0123456789abcdef"}
    specs["mixed"] = {**specs["reference"], "provider_abi": "1:linear"}
    return asyncio.run(capture(specs, tiny_home, tiny_redis))


async def capture(specs: dict[str, dict[str, str]], home: Path, redis_url: str) -> Captured:
    with compile_worker(home, redis_url) as worker:
        async with connect(worker) as client:
            asked = await client.request(*specs.values())
            phases = (pb.GRAPH_PHASE_PUBLISHED, pb.GRAPH_PHASE_FAILED)
            done = await client.until([state.key for state in asked], *phases, deadline_s=360)
            states = {name: done[state.key] for name, state in zip(specs, asked, strict=True)}
            wait_until(lambda: not has_captures(home))
            native = states["native"]
            assert native.phase == pb.GRAPH_PHASE_PUBLISHED, native.error
            cache = GraphCache(home / "cache", TrustedKeys.load(home / "keys" / "trusted"))
            graph = await fetch_graph(client.graphs, cache, native.key, spec=specs["native"])
        threads = fork_server_of(worker).num_threads()
    return Captured(specs=specs, states=states, graph=graph, home=home, threads=threads)


@pytest.mark.timeout(400)
def test_graph_of_a_tiny_model(captured: Captured, tmp_path: Path) -> None:
    good, graph = captured.states["native"], captured.graph
    assert "graph_source is 0123456789abcdef" in captured.states["stale"].error
    assert captured.threads == 1  # a fork beside threads may hang
    assert good.max_relative_error == 0.0
    assert good.layer_us > 0
    assert good.capture_s > 0
    with zipfile.ZipFile(graph.graph_path) as package:
        assert any(name.endswith(".so") for name in package.namelist())
    assert "g++" in graph.manifest.compiler
    leaves_no_files_behind(graph.graph_path, tmp_path / "temporary")


def fork_server_of(worker: WorkerProcess) -> psutil.Process:
    children = psutil.Process(worker.process.pid).children()
    return next(child for child in children if fork_server.__name__ in words(child.pid))


def leaves_no_files_behind(package: Path, folder: Path) -> None:
    """A process that has loaded a graph may be killed at any time."""
    folder.mkdir()
    program = f"""
import os, torch
from pathlib import Path
from precast.graphs.capture import export
from precast.graphs.runner import Graph
from precast.models.load import random_weights
from tests.integration.test_real_capture import SHAPE
generator = torch.Generator().manual_seed(0)
plan = export.verification_plan(SHAPE, 2)
weights = random_weights(SHAPE, plan, 64, generator)
caches = [export.random_cache(SHAPE, 32, generator) for _ in plan]
graph = Graph(Path({str(package)!r}), 2, SHAPE, weights, caches)
inputs = export.decode_inputs(SHAPE, 32, [3, 4], generator)
graph.replay(inputs.token_ids, inputs.positions, inputs.paging)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "TMPDIR": str(folder)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120)
    assert run.returncode == -9
    assert list(folder.iterdir()) == []


WRONG = "tests.integration.test_real_capture:capture_wrong"


def capture_wrong() -> int:
    """A capture whose eager steps are wrong in one bit."""
    right, calls = export.eager_step, []

    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        out = right(*arguments, **named)
        calls.append(1)
        if len(calls) == 2:
            out[0, 9] = out[0, 9].nextafter(2 * out[0, 9])  # the last bit
        return out

    export.eager_step = wrong
    return entry.main()


@pytest.mark.timeout(400)
def test_graph_that_differs_from_eager_is_kept_with_its_inputs(tmp_path: Path) -> None:
    done = run_capture(tiny_spec(), tmp_path, program=WRONG)
    assert done.returncode == 3, done.stderr[-2000:]
    assert not (tmp_path / "report.json").exists()
    found = read_mismatch(tmp_path)
    assert found
    assert (found.output, found.index) == ("logits", (0, 9))
    assert found.text in done.stderr
    assert found.expected is not None
    assert found.actual is not None
    assert 0 < found.differences["logits"] < 1e-6
    assert found.bound == found.differences["keys of layer 0"] == 0.0
    tensors = load_file(tmp_path / "failure" / "tensors.safetensors")
    assert tensors["expected"][9] == found.expected
    assert tensors["actual"][9] == found.actual
    assert tuple(tensors["context_lens"].tolist()) == found.context_lens
    assert {"token_ids", "positions", "slots", "block_tables"} <= tensors.keys()


@pytest.mark.timeout(400)
def test_graphs_of_several_providers(captured: Captured, tmp_path: Path) -> None:
    """Another provider's operators are called through the dispatcher, where its kernels are. What a
    fork after another provider's makes is to the byte what a process of its own makes."""
    specs, states = captured.specs, captured.states
    called, direct = states["reference"], states["native"]
    assert (specs["reference"]["provider"], specs["native"]["provider"]) == ("reference", "native")
    assert 0 <= called.max_relative_error < 3e-2, called.error
    assert called.phase == pb.GRAPH_PHASE_PUBLISHED, called.error
    assert "provider_abi is 1:linear, but " in states["mixed"].error
    published = captured.home / "store" / direct.key / "1" / "graph.pt2"
    by_hand = captured_by_hand(specs["native"], tmp_path / "hand")
    assert published.read_bytes() == by_hand.read_bytes()


def captured_by_hand(spec: dict[str, str], folder: Path) -> Path:
    """In another folder, by a process that has done nothing before, without parts of others."""
    folder.mkdir()
    (folder / "kept").mkdir()
    (folder / "kept" / "objects").symlink_to(BUILD_DIR / "objects")
    done = run_capture(spec, folder, folder / "kept")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "graph.pt2"
