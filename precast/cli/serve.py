"""``precast serve``: every service on this machine, watched over by one process."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from precast.access.api_keys import KeyRing
from precast.cli import stack as stacks
from precast.cli.view import View, open_view, print_settings
from precast.config.settings import GatewaySettings, ServeSettings, load_settings
from precast.errors import ConfigError, PrecastError
from precast.rpc.address import is_loopback

if TYPE_CHECKING:
    from precast.cli.supervisor import Supervisor

STOP_GRACE_S: Final = 20.0
REDIS_DEADLINE_S: Final = 15.0
_LOOK_INTERVAL_S: Final = 0.5


def run(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM. Raises ``PrecastError`` if the stack can't start."""
    console = Console()
    console.print("settings:")
    print_settings(console, settings)
    warn_if_open(console, settings)
    url = f"http://{_shown_host(settings.host)}:{settings.port}"
    if not settings.port:
        raise ConfigError("port = 0: serve needs a port of its own to tell you")
    sources = (settings.model, *settings.more_models)
    settings = named(settings)
    with stacks.sole_owner(settings.home), open_view(console, url, settings.model) as view:
        plan = stacks.plan(settings)
        for source in sources:
            _import_model(source, settings.home / "models", view)
        asyncio.run(_serve(plan, settings, url, view))
    console.print("stopped")


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


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::", "*"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


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
    from precast.models.importing.hub import default_name, hub_name

    if _is_file(settings.home / "models", source):
        return Path(source).name.removesuffix(".gguf")
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

    os.environ["PRECAST_REDIS_URL"] = plan.redis_url  # for the children, forked ones too
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
        first, *waiting = stacks.worker_names(plan)
        supervisor.start([stacks.COMPILE_WORKER, stacks.GATEWAY, first])
        while not stop.is_set():
            supervisor.check()
            status = await observer.look()
            # One after the other: each takes its share of the memory that those before have left.
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
