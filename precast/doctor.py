"""Whether this machine can serve: findings about its hardware, its software and its surroundings.

Each finding is ``ok``, a ``warning`` (it serves, but slower, or not everything) or a ``problem``
(it can't serve). Nothing is changed and nothing is left behind.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from precast.config.secrets import masked
from precast.config.settings import DecodeWorkerSettings
from precast.errors import ConfigError, ModelNotFound, PrecastError
from precast.models.importing.catalog import BrokenModel, list_models
from precast.sizing import size
from precast.system.cpu import this_cpu
from precast.system.free_memory import FreeMemory, free_memory, gib
from precast.system.placement import Machine, compute_threads, described, plan, this_machine
from precast.system.process import available_cpus
from precast.system.shared_memory import FOLDER
from precast.system.topology import cpu_list

if TYPE_CHECKING:
    from precast.models.config import ModelConfig

State = Literal["ok", "warning", "problem"]
_GROUP_BYTES_A_RANK: Final = 2 << 20
_ROOMY_SHM: Final = 64 << 20
_BANDWIDTH_BYTES: Final = 256 << 20
_BANDWIDTH_S: Final = 1.0
_REDIS_TIMEOUT_S: Final = 1.0
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    state: State
    detail: str
    """What was found, and what to do about it where that is something."""


def examine(settings: DecodeWorkerSettings) -> Iterator[Finding]:
    """Every finding, as it is made; takes about two seconds, one of them for the memory."""
    checks: list[Callable[[DecodeWorkerSettings], Finding]] = [
        _cpu,
        _memory,
        _huge_pages,
        _shared_memory,
        _torch,
        _kernels,
        _compiler,
        _redis,
    ]
    for check in checks:
        yield check(settings)
    yield from _models(settings)
    yield from planned(settings, this_machine(), free_memory())
    if not _native_problem():
        yield _bandwidth()
        yield from _providers(settings)


def _cpu(settings: DecodeWorkerSettings) -> Finding:
    cpu = this_cpu()
    extras = [name for name, there in (("AVX-512", cpu.avx512), ("AMX", cpu.amx)) if there]
    found = f"{cpu.model}, {len(available_cpus())} CPUs of {os.cpu_count()}"
    if not {"avx2", "fma"} <= cpu.flags:
        return _finding("cpu", "warning", f"{found}; no AVX2: kernels will be slow")
    return _finding("cpu", "ok", ", ".join([found, "AVX2", *extras]))


def _memory(settings: DecodeWorkerSettings) -> Finding:
    free = free_memory()
    return _finding("memory", "warning" if free.nbytes < 1 << 30 else "ok", free.why)


def planned(
    settings: DecodeWorkerSettings, machine: Machine, free: FreeMemory
) -> Iterator[Finding]:
    """Where a decode worker would compute, with how much KV memory, and why."""
    try:
        placement = plan(machine, tp=settings.tp, replicas=settings.replicas, cores=settings.cores)
    except ConfigError as error:
        yield _finding("placement", "problem", str(error))
        return
    yield _finding("placement", "ok", "; ".join(placement.reasons))
    for warning in placement.warnings:
        yield _finding("placement", "warning", warning)
    for index, ranks in enumerate(placement.replicas):
        of = f"replica {index} " if settings.replicas > 1 else ""
        for number, rank in enumerate(ranks):
            yield _finding(f"{of}rank {number}", "ok", described(rank))
    spare = f"CPUs {cpu_list(placement.spare)}" if placement.spare else "the ranks' cores"
    yield _finding("leader, gateway", "ok", spare)
    yield _kv_memory(settings, free)


def _kv_memory(settings: DecodeWorkerSettings, free: FreeMemory) -> Finding:
    try:
        sizing = size(settings, settings.model_dir, free)
    except ModelNotFound as error:
        return _finding("kv memory", "warning", f"depends on the model: {error}")
    except PrecastError as error:
        return _finding("kv memory", "problem", str(error))
    tokens = sizing.blocks * settings.block_size
    found = f"{gib(sizing.kv_bytes)} for {tokens} tokens, contexts of up to {sizing.context}"
    if sizing.window_blocks:
        found += f", windows of {sizing.window_blocks * settings.block_size} tokens"
    return _finding("kv memory", "ok", f"{found}; {sizing.why}")


def _huge_pages(settings: DecodeWorkerSettings) -> Finding:
    try:
        chosen = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        chosen = None
    value = chosen[1] if chosen else "not there"
    if value in ("always", "madvise"):
        return _finding("huge pages", "ok", value)
    return _finding("huge pages", "warning", f"{value}: weights are read about a third slower")


def _shared_memory(settings: DecodeWorkerSettings) -> Finding:
    needed = settings.tp * _GROUP_BYTES_A_RANK + (1 << 20) if settings.tp > 1 else 0
    try:
        usage = shutil.disk_usage(FOLDER)
    except OSError as error:
        return _finding("shared memory", "problem" if needed else "warning", str(error))
    found = f"{usage.free >> 20} MiB free of {usage.total >> 20} in {FOLDER}"
    if usage.free < needed:
        return _finding(
            "shared memory", "problem", f"{found}: tp = {settings.tp} needs {needed >> 20} MiB"
        )
    return _finding("shared memory", "ok" if usage.free >= _ROOMY_SHM else "warning", found)


def _torch(settings: DecodeWorkerSettings) -> Finding:
    try:
        return _finding("torch", "ok", version("torch"))
    except PackageNotFoundError:
        return _finding("torch", "problem", "not installed")


def _native_problem() -> str:
    """Why our kernels can't be used; empty if they can."""
    try:
        from precast.ops import native

        native.native_isa()
    except (PrecastError, ImportError, OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return ""


def _kernels(settings: DecodeWorkerSettings) -> Finding:
    if problem := _native_problem():
        return _finding("native kernels", "problem", problem)
    from precast.ops.native import native_isa

    return _finding("native kernels", "ok", native_isa())


def _compiler(settings: DecodeWorkerSettings) -> Finding:
    name = os.environ.get("CXX", "g++")
    try:
        done = subprocess.run(
            [name, "-dumpfullversion"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return _finding(
            "compiler", "warning", f"no {name}: decode workers need none, compile workers do"
        )
    return _finding("compiler", "ok", f"{name} {done.stdout.strip()}")


def _redis(settings: DecodeWorkerSettings) -> Finding:
    import redis

    host = masked(settings.redis_url).rpartition("@")[2].removeprefix("redis://")
    try:
        client = redis.Redis.from_url(
            settings.redis_url,
            socket_timeout=_REDIS_TIMEOUT_S,
            socket_connect_timeout=_REDIS_TIMEOUT_S,
        )
        with client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return _finding("redis", "warning", f"{host}: {reason}; precast serve starts its own")
    return _finding("redis", "ok", host)


def _models(settings: DecodeWorkerSettings) -> Iterator[Finding]:
    found = list_models(settings.models_dir)
    if not found:
        advice = f"none in {settings.models_dir}; `precast models import` adds one"
        yield _finding("model", "warning", advice)
    for model in found:
        if isinstance(model, BrokenModel):
            yield _finding(f"model {model.name}", "warning", f"can't be served: {model.problem}")
        else:
            size = f"{model.parameters / 1e6:.0f}M parameters, {model.size_bytes >> 20} MiB"
            yield _finding(f"model {model.name}", "ok", f"{model.architecture}, {size}")


def _bandwidth() -> Finding:
    """Reads memory for about a second, with as many threads as a worker would have."""
    import torch

    from precast.ops import native
    from precast.system.memory import Arena

    native.start_threads(compute_threads())
    data = Arena().empty((_BANDWIDTH_BYTES,)).view(torch.int64).fill_(1)
    fastest, end = float("inf"), time.perf_counter() + _BANDWIDTH_S
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.ops.precast.read_memory(data)
        fastest = min(fastest, time.perf_counter() - started)
    return _finding("memory bandwidth", "ok", f"{_BANDWIDTH_BYTES / fastest / 1e9:.1f} GB/s read")


def _providers(settings: DecodeWorkerSettings) -> Iterator[Finding]:
    """Who would serve each operator of the model that is set, and why not who was asked for."""
    from precast.models.options import GptOssOptions, experts_of
    from precast.ops import providers
    from precast.ops.packing import Format

    config = _config(settings)
    precision = settings.precision(config.own_quantization if config else None)
    formats = (precision.quantization, precision.head_quantization)
    plain = settings.weight_dtype
    needs = providers.Needs(
        weight_dtype=plain,
        formats=frozenset(Format[(plain if f == "none" else f).upper()] for f in formats),
        kv_dtype=settings.kv_dtype,
        head_dim=config.head_dim if config else 64,  # most models'
        experts=experts_of(config.options) if config else 0,
        limited_experts=config is not None and isinstance(config.options, GptOssOptions),
    )
    selection = providers.select(settings.kernel_provider, needs)
    for name, text in providers.described(selection).items():
        state: State = "warning" if selection.choices[name].reason else "ok"
        yield _finding(f"operator {name}", state, text)
    yield _finding("operator collectives", "ok", "native")


def _config(settings: DecodeWorkerSettings) -> "ModelConfig | None":
    """Of the model that is set, if it is there."""
    from precast.models.config import load_config

    try:
        return load_config(settings.model_dir)
    except PrecastError:
        return None


def _finding(name: str, state: State, detail: str) -> Finding:
    return Finding(name=name, state=state, detail=detail)
