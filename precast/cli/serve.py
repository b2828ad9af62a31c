"""``precast serve``: every service on this machine, watched over by one process."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from precast.access.api_keys import KeyRing
from precast.cli import stack as stacks
from precast.cli.view import View, open_view, print_settings
from precast.config.settings import (
    GatewaySettings,
    ServeSettings,
    adapter_of,
    describe,
    load_settings,
)
from precast.errors import ConfigError, PrecastError
from precast.rpc.address import is_loopback

if TYPE_CHECKING:
    from precast.cli.forks import Forks
    from precast.cli.supervisor import Supervisor

STOP_GRACE_S: Final = 20.0
REDIS_DEADLINE_S: Final = 15.0
MODELS_SHARE: Final = 0.7
"""Of the free memory, for models on demand. The rest is for captures, gateway and page cache."""
_LOOK_INTERVAL_S: Final = 0.5


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises ``PrecastError`` if the stack can't start."""
    console = Console()
    console.print("settings:")
    print_settings(console, settings)
    warn_if_open(console, settings)
    url = gateway_url(settings)
    if not settings.port:
        raise ConfigError("port = 0: serve needs a port of its own to tell you")
    sources = needed(settings)
    settings = bounded(named(settings))
    with stacks.sole_owner(settings.home), open_view(console, url, _shown_model(settings)) as view:
        plan = stacks.plan(settings)
        if settings.models_on_demand:
            view.stage(f"models on demand may take {settings.models_memory_mb} MiB together")
        for source in sources:
            _import_model(source, settings.home / "models", view)
        check_adapters(settings)
        asyncio.run(_serve(plan, settings, url, view))
    console.print("stopped")


def check_adapters(settings: ServeSettings) -> None:
    """Raises ConfigError for one that is not there, or on demand whose name a folder of the models
    has."""
    from precast.models.weights.adapter_folder import is_adapter

    models_dir, on_demand = settings.home / "models", settings.models_on_demand
    for name, folder in map(adapter_of, settings.adapter):
        if folder is None and not is_adapter(models_dir / name):
            raise ConfigError(f"adapter = {name}: no adapter of this name is in {models_dir}")
        if on_demand and folder is not None and (models_dir / name).is_dir():
            raise ConfigError(f"adapter = {name}: {models_dir} has a folder of this name")


def warn_if_open(console: Console, settings: ServeSettings) -> None:
    """Where the gateway will ask nobody for a key, and others than this machine reach it."""
    if is_loopback(settings.host):
        return
    gateway = load_settings(GatewaySettings, home=settings.home)  # whose keys may be elsewhere
    if KeyRing(folder=gateway.api_keys_dir).open:
        console.print(
            f"warning: whoever reaches {settings.host}:{settings.port} may use it, for there are "
            "no API keys: precast keys api create NAME",
            soft_wrap=True,
        )


def gateway_url(settings: ServeSettings) -> str:
    """Where the gateway is reached from this machine, by what it speaks."""
    gateway = load_settings(GatewaySettings, home=settings.home, port=settings.port, metrics_port=0)
    scheme = "http" if gateway.https_certificate is None else "https"
    return f"{scheme}://{_shown_host(settings.host)}:{settings.port}"


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::", "*"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def needed(settings: ServeSettings) -> tuple[str, ...]:
    """Models that have to be there before anything starts. On demand the default one is, if nothing
    else can be served, or adapters are given for it."""
    from precast.models.importing.catalog import model_names

    if settings.models_on_demand and _is_default(settings, "model") and not settings.adapter:
        others = settings.more_models or model_names(settings.home / "models")
        return settings.more_models if others else (settings.model,)
    return (settings.model, *settings.more_models)


def bounded(settings: ServeSettings) -> ServeSettings:
    """With the memory that models on demand may take, where that was not set."""
    from precast.system.free_memory import free_memory

    if settings.models_memory_mb is not None or not settings.models_on_demand:
        return settings
    share = int(free_memory().nbytes * MODELS_SHARE) >> 20
    return settings.model_copy(update={"models_memory_mb": max(1, share)})


def _shown_model(settings: ServeSettings) -> str:
    """The model to try: the first that is there, where the one that is set is not."""
    from precast.models.importing.catalog import model_names

    models_dir = settings.home / "models"
    if settings.models_on_demand and not (models_dir / settings.model).is_dir():
        return next(iter(model_names(models_dir)), settings.model)
    return settings.model


def _is_default(settings: ServeSettings, name: str) -> bool:
    return {row.name: row.source for row in describe(settings)}[name] == "default"


def named(settings: ServeSettings) -> ServeSettings:
    """Settings with the names of their models, also of those on a hub. Raises ConfigError if two
    have the same."""
    sources = (settings.model, *settings.more_models)
    names = [_name(settings, text) for text in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"more_models: two are called {name}")
    return settings.model_copy(update={"model": names[0], "more_models": tuple(names[1:])})


def _name(settings: ServeSettings, source: str) -> str:
    from precast.models.importing.gguf.parts import model_name
    from precast.models.importing.hub import default_name, hub_name

    if _is_file(settings.home / "models", source):
        return model_name(Path(source).name)
    return default_name(found) if (found := hub_name(source)) else source


def _is_file(models_dir: Path, source: str) -> bool:
    """Whether it is a GGUF file, and neither a model that is called so nor a hub's."""
    path = Path(source).expanduser()
    return path.suffix == ".gguf" and path.is_file() and not (models_dir / source).is_dir()


def _import_model(source: str, models_dir: Path, view: View) -> None:
    """Make sure that the model is there and can be served. Raises ``PrecastError``."""
    from precast.models.importing.built_in import BUILT_IN
    from precast.models.importing.catalog import find_model
    from precast.models.importing.hub import hub_name
    from precast.models.importing.importer import import_file, import_model
    from precast.models.importing.pull import pull_model

    def report(stage: str) -> None:
        view.stage(f"importing {source}: {stage}")

    if source in BUILT_IN:
        import_model(source, models_dir, report=report)
    elif _is_file(models_dir, source):
        import_file(Path(source), models_dir, report=report)
    elif found := hub_name(source):
        pull_model(found, models_dir, report=report)
    else:
        find_model(models_dir, source)


async def _serve(plan: stacks.Stack, settings: ServeSettings, url: str, view: View) -> None:
    # imported here: redis and httpx would slow down every other command
    from precast.cli.forks import Forks
    from precast.cli.status import Observer
    from precast.cli.supervisor import Supervisor

    os.environ |= stacks.for_children(settings, plan)  # forked ones too
    stop = asyncio.Event()
    forks = Forks()
    supervisor = Supervisor(plan.specs, forks)

    def on_signal() -> None:
        if stop.is_set():  # asked twice: don't wait for anything
            supervisor.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    observer = Observer(supervisor.children, plan.redis_url, url)
    try:
        if plan.embedded_redis:
            view.stage(f"starting Redis at {plan.redis_url}")
            supervisor.start([stacks.REDIS])
            await _until_redis_answers(plan, supervisor, stop)
        async with _models_on_demand(plan, settings, supervisor, forks):
            waiting = stacks.worker_names(plan)
            supervisor.start([stacks.COMPILE_WORKER, stacks.GATEWAY, *waiting[:1]])
            del waiting[:1]
            while not stop.is_set():
                supervisor.check()
                status = await observer.look()
                # One after the other: each takes its share of what those before have left.
                if waiting and not status.is_starting(stacks.DECODE_WORKER, but=waiting):
                    supervisor.start([waiting.pop(0)])
                view.status(status)
                await _sleep_or(stop, _LOOK_INTERVAL_S)
    finally:
        view.stage("stopping")
        await supervisor.stop(STOP_GRACE_S)
        await forks.close()
        await observer.close()
        _sweep_shared_memory()


@asynccontextmanager
async def _models_on_demand(
    plan: stacks.Stack, settings: ServeSettings, supervisor: "Supervisor", forks: "Forks"
) -> AsyncIterator[None]:
    """Starts models as gateways ask for them, and stops them all at the end."""
    if not plan.model_host:
        yield
        return
    from precast.cli.on_demand.home_models import HomeModels
    from precast.cli.on_demand.host import ModelHost
    from precast.cli.on_demand.process import WorkerProcess
    from precast.fleet.leases import Registry
    from precast.rpc.model_link import serving_models

    registry, bound = Registry.connect(plan.redis_url), (settings.models_memory_mb or 0) << 20
    host = ModelHost(
        models=HomeModels(settings, stacks.passed_on(settings), bound),
        start=lambda model: WorkerProcess(
            model.name,
            stacks.on_demand(settings, model),
            forks,
            registry,
            supervisor.children,
        ),
        bound=bound,
        idle_s=settings.idle_timeout,
    )
    watching = asyncio.create_task(host.keep_watch(), name="idle models")
    try:
        async with serving_models(plan.model_host, host):
            yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await host.close()
        await registry.close()


async def _until_redis_answers(
    plan: stacks.Stack, supervisor: "Supervisor", stop: asyncio.Event
) -> None:
    from precast.system.redis_server import answers

    end = time.monotonic() + REDIS_DEADLINE_S
    while not stop.is_set():
        supervisor.check()
        if await asyncio.to_thread(answers, plan.redis_url):
            return
        if time.monotonic() > end:
            log = plan.specs[0].log_path
            raise PrecastError(f"Redis does not answer at {plan.redis_url}: {_tail(log)}")
        await _sleep_or(stop, 0.05)


async def _sleep_or(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


def _tail(log: Path) -> str:
    from precast.cli.logs import last_line

    return f"{last_line(log)} (log: {log})"


def _sweep_shared_memory() -> None:
    """Remove what killed ranks have left; ranks that end by themselves clean up."""
    from precast.system.shared_memory import sweep_segments

    sweep_segments()
