"""KV blocks: what the cache and the weights take, and what a machine or a container leaves."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from torch.utils._pytree import tree_leaves

from precast.config.settings import DecodeWorkerSettings, load_settings
from precast.errors import ConfigError
from precast.models.config import load_config
from precast.models.kv_cache import new_cache
from precast.models.load import load_weights
from precast.models.precision import (
    KvDtype,
    Precision,
    Quantization,
    WeightDtype,
    cached_head_bytes,
)
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.models.weights.size import weight_bytes
from precast.models.windows import blocks_of_window
from precast.sizing import KV_MEMORY_SHARE, PROCESS_BYTES, Sizing, size
from precast.system.free_memory import FreeMemory, free_memory
from tests.support.machines import cgroup2, meminfo, write_tree
from tests.support.models import config, tensors, write_model

MIB, GIB = 1 << 20, 1 << 30
BLOCK = 2 * 2 * 2 * 32 * 8 * 4
"""Of the tiny model: keys and values of 2 layers' 2 heads, 32 tokens of 8 floats."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_model(home / "models" / "tiny")
    return home


def sized(home: Path, nbytes: int, **flags: object) -> Sizing:
    settings = load_settings(DecodeWorkerSettings, home=home, model="tiny", **flags)
    return size(settings, settings.model_dir, FreeMemory(nbytes=nbytes, why="so much is left"))


def write_config(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
def test_bytes_are_those_of_the_cache(kv_dtype: KvDtype) -> None:
    cache = new_cache(kv_dtype, blocks=3, kv_heads=2, block_size=16, head_dim=20)
    assert cache.k.nbytes == cache.v.nbytes == 3 * 2 * 16 * cached_head_bytes(kv_dtype, 20)


def test_a_full_batch_of_full_contexts_where_there_is_room(home: Path) -> None:
    sizing = sized(home, 64 * GIB)
    assert (sizing.context, sizing.block_bytes) == (256, BLOCK)
    assert sizing.blocks == 32 * 256 // 32
    assert sizing.kv_bytes == sizing.blocks * BLOCK
    assert sizing.why.endswith("; so much is left")


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize(("kv_dtype", "times"), [("fp32", 1), ("bf16", 2)])
def test_replicas_share_the_memory_and_smaller_types_hold_more(
    home: Path, kv_dtype: KvDtype, times: int, replicas: int
) -> None:
    free = 4 * GIB
    sizing = sized(
        home, free, kv_dtype=kv_dtype, replicas=replicas, batch_sizes="512", max_batch_size=1 << 20
    )
    share = int(free / replicas * KV_MEMORY_SHARE) * times // BLOCK
    assert abs(sizing.blocks - share) <= times


def test_the_cache_has_what_weights_and_processes_leave(home: Path) -> None:
    """Less than its share of the whole, where that is little."""
    free = 2 * PROCESS_BYTES + 40 * MIB
    sizing = sized(home, free, batch_sizes="512", max_batch_size=1 << 20)
    left = 40 * MIB - sizing.weight_bytes
    assert left - BLOCK < sizing.kv_bytes <= left


def test_one_sequence_is_the_least(home: Path) -> None:
    free = 2 * PROCESS_BYTES + MIB
    assert sized(home, free, max_batch_size=32).blocks >= 256 // 32


def test_what_does_not_fit_is_refused_with_the_numbers(home: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        sized(home, 512 * MIB, replicas=1)
    assert str(refused.value) == (
        "tiny does not fit: weights 0 MiB, KV cache 0 MiB (one sequence), processes 512 MiB; so "
        "much is left; a smaller max_context_length or quantization takes less"
    )


def test_blocks_that_were_asked_for_must_fit(home: Path) -> None:
    assert sized(home, 4 * GIB, kv_blocks=200_000).blocks == 200_000
    with pytest.raises(ConfigError, match=r"KV cache 6\.1 GiB \(kv_blocks = 800000\)"):
        sized(home, 4 * GIB, kv_blocks=800_000)
    with pytest.raises(ConfigError, match="so much is left, for 4 replicas"):
        sized(home, 4 * GIB, kv_blocks=200_000, replicas=4)


def test_a_container_of_8_gib_on_a_host_of_256(tmp_path: Path, home: Path) -> None:
    """Of the host's memory the cache would take 72 GiB."""
    files = {"memory.max": f"{8 * GIB}\n", "memory.current": f"{GIB}\n"}
    free = free_memory(write_tree(tmp_path, {"proc/meminfo": meminfo(256)}, cgroup2("/", files)))
    settings = load_settings(
        DecodeWorkerSettings, home=home, model="tiny", batch_sizes="512", max_batch_size=1 << 20
    )
    sizing = size(settings, settings.model_dir, free)
    assert 2 * GIB < sizing.kv_bytes <= 7 * GIB * KV_MEMORY_SHARE
    assert "/sys/fs/cgroup/memory.max allows 8.0 GiB, 1.0 GiB of it are used" in sizing.why


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 26,
    "head_dim": 256,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_hidden_layers": 32,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}


@pytest.mark.parametrize(
    ("model", "full_layers", "times"), [(GEMMA, 4, 3.5), (GPT_OSS, 12, 1.8), (MISTRAL, 0, 6.0)]
)
def test_windows_leave_memory_to_more_tokens(
    tmp_path: Path, model: dict[str, object], full_layers: int, times: float
) -> None:
    """Of contexts that fill the memory; every layer of a full one is counted as it is."""
    write_config(tmp_path / "models" / "tiny", **model)
    layers = model["num_hidden_layers"]
    assert isinstance(layers, int)
    sizing = sized(tmp_path, 32 * GIB, kv_dtype="bf16")
    assert sizing.block_bytes * (layers - full_layers) == sizing.window_block_bytes * full_layers
    every_layer = sizing.block_bytes + sizing.window_block_bytes
    assert sizing.kv_bytes <= 32 * GIB * KV_MEMORY_SHARE
    before = min(sizing.kv_bytes // every_layer, sizing.blocks)
    windows = blocks_of_window(int(str(model["sliding_window"])), 32)
    sequences = sizing.window_blocks // windows
    assert sequences >= 2
    assert min(sizing.blocks, sequences * sizing.context // 32) >= times * before


def test_windows_of_a_small_cache_are_no_more_than_it_has(tmp_path: Path) -> None:
    write_config(tmp_path / "models" / "tiny", **GEMMA)
    assert sized(tmp_path, 8 * GIB, kv_blocks=100).window_blocks == 100
    assert 1000 < sized(tmp_path, 8 * GIB, kv_blocks=10_000).window_blocks < 3000


def test_a_context_that_the_model_has_not(home: Path) -> None:
    with pytest.raises(ConfigError, match="max_context_length = 512: tiny has 256 positions"):
        sized(home, 4 * GIB, max_context_length=512)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("fp32", "none"), ("bf16", "none"), ("fp32", "int8"), ("bf16", "q8_0"), ("bf16", "q4_0")],
)
def test_weights_are_as_large_as_they_turn_out(
    tmp_path: Path, dtype: WeightDtype, quantization: Quantization, tied: bool, tp: int
) -> None:
    """To within 3 %; a tensor begins on a cache line of its own, and mappings are whole."""
    changes = {"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": tied}
    folder = write_model(tmp_path / "model", **changes)
    values = tensors(**changes)
    if not tied:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    save_file(values, folder / "model.safetensors")
    config = load_config(folder)
    precision = Precision(
        weight_dtype=dtype, quantization=quantization, head_quantization=quantization
    )
    held = 0
    for rank in range(tp):
        part = shard(config, rank, tp)
        weights = load_weights(folder, config, part, shape_of(config, part, precision), 64)
        leaves = tree_leaves((weights.embed, weights.layers, weights.head))
        held += sum({leaf.data_ptr(): leaf.nbytes for leaf in leaves}.values())
    told = weight_bytes(config, precision, tp=tp, positions=64)
    assert told == pytest.approx(held, rel=0.03)
