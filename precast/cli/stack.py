"""What ``precast serve`` runs: which processes, with which flags, and the ports that they need."""

import fcntl
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from precast.cli.forks import SERVICES as FORKED
from precast.cli.on_demand.parts import HomeModel
from precast.cli.supervisor import PROBE_S, ChildSpec
from precast.config.settings import ServeSettings, adapter_of, describe
from precast.errors import ConfigError
from precast.system.redis_password import without_password

LOOPBACK: Final = "127.0.0.1"
REDIS: Final = "redis"
COMPILE_WORKER: Final = "compile-worker"
DECODE_WORKER: Final = "decode-worker"
GATEWAY: Final = "gateway"

GATEWAY_DRAIN_S: Final = 5
_PASSED_ON: Final = (
    "weight_dtype",
    "quantization",
    "head_quantization",
    "kv_dtype",
    "tp",
    "cores",
    "batch_sizes",
    "prefill_buckets",
    "max_context_length",
)
"""Settings of ``serve`` that are the decode worker's."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The processes to run, and where they meet."""

    specs: Sequence[ChildSpec]
    """In the order in which they start."""
    redis_url: str
    """Children find it in their environment (``for_children``): every user of the machine can read
    command lines, and a URL may hold a password."""
    embedded_redis: bool
    model_host: str = ""
    """Where gateways have models started (``precast.rpc.model_link``); empty: nowhere."""


def plan(settings: ServeSettings) -> Stack:
    """The stack that these settings describe. Raises ``ConfigError`` if a port is taken."""
    # imported here: the redis client would slow down every other command
    from precast.system.redis_server import answers, redis_command

    _check_ports(settings)
    redis_url, port = _redis(settings)
    logs = settings.home / "logs"
    data = settings.home / "redis"
    for folder in (logs, data):
        folder.mkdir(parents=True, exist_ok=True)
    specs = []
    if port is not None:
        command = redis_command(data, port)
        specs.append(
            ChildSpec(
                name=REDIS,
                command=command,
                log_path=logs / f"{REDIS}.log",
                probe=lambda: answers(redis_url, PROBE_S),
            )
        )
    host = f"models-{os.getpid()}-{secrets.token_hex(8)}" if settings.models_on_demand else ""
    specs += [service(settings, *one) for one in _flags(settings, host).items()]
    return Stack(specs=specs, redis_url=redis_url, embedded_redis=port is not None, model_host=host)


def service(settings: ServeSettings, name: str, own: Mapping[str, object]) -> ChildSpec:
    """A service of ours that has these flags beside those that all have."""
    program = DECODE_WORKER if name.startswith(DECODE_WORKER) else name
    flags = {**own, "home": settings.home, "log-level": settings.log_level}
    flags["log-format"] = settings.log_format
    flags |= {} if settings.tls_dir is None else {"tls-dir": settings.tls_dir}
    if settings.otlp_endpoint is not None:
        flags["otlp-endpoint"] = settings.otlp_endpoint
    given = [f"--{flag}={value}" for flag, value in flags.items()]
    return ChildSpec(
        name=name,
        command=(sys.executable, "-m", "precast", program, *given),
        log_path=settings.home / "logs" / f"{name}.log",
        fork=(program, *given) if program in FORKED else (),
        beats=True,
    )


def on_demand(settings: ServeSettings, model: HomeModel) -> ChildSpec:
    """The decode worker of a model that is asked for."""
    flags = _worker_flags(settings)
    flags |= {"listen": f"{LOOPBACK}:0", "model": model.name}
    flags |= {"kv-blocks": model.kv_blocks, "max-context-length": model.context_length}
    # of this model alone, whatever environment and file say
    flags["adapter"] = _text(tuple(one.setting for one in model.adapters))
    return service(settings, f"{DECODE_WORKER}-{model.name}", flags)


def for_children(settings: ServeSettings, stack: Stack) -> dict[str, str]:
    """Variables that tell services where Redis is. A password that comes out of a file stands in
    none of them: they read the file."""
    if (file := settings.redis_password_file) is None:
        return {"PRECAST_REDIS_URL": stack.redis_url}
    return {
        "PRECAST_REDIS_URL": without_password(stack.redis_url),
        "PRECAST_REDIS_PASSWORD_FILE": str(file),
    }


@contextmanager
def sole_owner(home: Path) -> Iterator[None]:
    """This home folder for one ``precast serve`` at a time. Raises ``ConfigError``."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "serve.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            raise ConfigError(
                f"home {str(home)!r}: process {owner} already serves from it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def passed_on(settings: ServeSettings) -> dict[str, object]:
    """Settings that are the decode workers', but those that are not given."""
    given = {name: getattr(settings, name) for name in _PASSED_ON}
    return {name: value for name, value in given.items() if value is not None}


def _flags(settings: ServeSettings, model_host: str) -> dict[str, dict[str, object]]:
    """Each service's own flags, in the order in which the services start."""
    models = () if model_host else (settings.model, *settings.more_models)
    flags: dict[str, dict[str, object]] = {
        COMPILE_WORKER: {"listen": f"{LOOPBACK}:{settings.compile_port}"},
        GATEWAY: {
            "host": settings.host,
            "port": settings.port,
            "metrics-port": settings.metrics_port,
            "workers": settings.gateway_workers,
            "cors-origins": _text(settings.cors_origins),
            "drain-timeout-s": GATEWAY_DRAIN_S,
            "expected-models": _text((*models, *(adapter_of(x)[0] for x in settings.adapter))),
        },
    }
    if model_host:
        flags[GATEWAY]["model-host"] = model_host
    for index, model in enumerate(models):
        name = f"{DECODE_WORKER}-{model}" if index else DECODE_WORKER
        port = 0 if index else settings.decode_port
        own = {"listen": f"{LOOPBACK}:{port}", "model": model}
        flags[name] = {**_worker_flags(settings), **own}
        if settings.adapter:  # a variable would give them to all
            flags[name]["adapter"] = "" if index else _text(settings.adapter)
    return flags


def _worker_flags(settings: ServeSettings) -> dict[str, object]:
    given = passed_on(settings).items()
    return {name.replace("_", "-"): _text(value) for name, value in given}


def worker_names(stack: Stack) -> list[str]:
    """Of the decode workers, in the order in which they start."""
    return [spec.name for spec in stack.specs if spec.name.startswith(DECODE_WORKER)]


def model_of(spec: ChildSpec) -> str:
    """Of a decode worker."""
    flag = "--model="
    return next(word.removeprefix(flag) for word in spec.command if word.startswith(flag))


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _redis(settings: ServeSettings) -> tuple[str, int | None]:
    """The Redis to use, and the port to start an embedded one on (None: it runs already).

    A Redis that was asked for is used if it answers. By default we start our own, on a free port if
    something else has Redis's: a stranger's data is none of our business.
    """
    from precast.system.redis_server import answers, free_port, loopback_port

    sources = {row.name: row.source for row in describe(settings)}
    asked_for = {sources["redis_url"], sources["redis_password_file"]} != {"default"}
    port = loopback_port(settings.redis_url)
    if asked_for and answers(settings.redis_url):
        return settings.redis_url, None
    if port is None or settings.redis_password_file is not None:
        raise ConfigError(f"redis_url = {settings.redis_url!r}: no Redis answers there")
    if _in_use(LOOPBACK, port):
        if asked_for:
            raise ConfigError(
                f"redis_url = {settings.redis_url!r}: the port is in use, not by Redis"
            )
        port = free_port()
    return f"redis://{LOOPBACK}:{port}/0", port


def _check_ports(settings: ServeSettings) -> None:
    wanted = (
        ("port", settings.host, settings.port),
        *_metrics_ports(settings),
        ("compile_port", LOOPBACK, settings.compile_port),
        ("decode_port", LOOPBACK, settings.decode_port),
    )
    taken: dict[int, str] = {}
    for name, host, port in wanted:
        if port and port in taken:
            raise ConfigError(f"{name} = {port}: the same as {taken[port]}")
        taken[port] = name
        if port and _in_use(host, port):
            flag = name.replace("_", "-")
            raise ConfigError(f"{name} = {port}: in use; free it or choose another with --{flag}")


def _metrics_ports(settings: ServeSettings) -> list[tuple[str, str, int]]:
    """One for each of the gateway's processes."""
    if not (first := settings.metrics_port):
        return []
    each = range(first, min(first + settings.gateway_workers, 65536))  # it refuses more itself
    return [("metrics_port", LOOPBACK, port) for port in each]


def _in_use(host: str, port: int) -> bool:
    """Whether nothing can listen there. Raises ``ConfigError`` if ``host`` is no address here."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"host = {host!r}: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return True
    return False
