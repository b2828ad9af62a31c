"""What the cache takes, and how many blocks of it a worker may have."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from precast.config.settings import DecodeWorkerSettings, load_settings
from precast.models.config import load_config
from precast.models.kv_cache import new_cache
from precast.models.precision import KvDtype, cached_head_bytes
from services.decode_worker import main
from tests.support.models import write_model


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
def test_bytes_are_those_of_the_cache(kv_dtype: KvDtype) -> None:
    cache = new_cache(kv_dtype, blocks=3, kv_heads=2, block_size=16, head_dim=20)
    assert cache.k.nbytes == cache.v.nbytes == 3 * 2 * 16 * cached_head_bytes(kv_dtype, 20)


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize(("kv_dtype", "times"), [("fp32", 1), ("bf16", 2)])
def test_replicas_share_the_memory_and_smaller_types_hold_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kv_dtype: KvDtype,
    times: int,
    replicas: int,
) -> None:
    write_model(tmp_path / "models" / "tiny")
    config = load_config(tmp_path / "models" / "tiny")
    settings = load_settings(
        DecodeWorkerSettings,
        home=tmp_path,
        model="tiny",
        kv_dtype=kv_dtype,
        replicas=replicas,
        batch_sizes="512",
        max_batch_size=8192,
    )
    block = 2 * config.num_layers * config.kv_heads * 32 * config.head_dim * 4
    free = SimpleNamespace(available=400 * block)
    monkeypatch.setattr(main.psutil, "virtual_memory", lambda: free)
    share = int(400 / replicas * main.KV_MEMORY_SHARE) * times
    assert abs(main.kv_blocks(settings, config, 32) - share) <= times
