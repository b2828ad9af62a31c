"""A rank, a leader or a gateway that notes when it does what, for ``bench.step``.

    python -m bench._traced leader | gateway | --fd N (a rank)

Functions are wrapped before the service starts: the services themselves know nothing of it. Spans
are written to ``PRECAST_BENCH_TRACE`` when the process ends.
"""

import functools
import inspect
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPANS: "deque[tuple[str, int, int]]" = deque(maxlen=400_000)
"""Name, beginning and end in nanoseconds of the monotonic clock, which processes have in common."""


def wrap(owner: Any, function: str, name: str) -> None:
    """Note each call of ``owner.function`` under a name."""
    whole: Callable[..., Any] = getattr(owner, function)

    @functools.wraps(whole)
    def timed(*arguments: Any, **options: Any) -> Any:
        begun = time.monotonic_ns()
        try:
            return whole(*arguments, **options)
        finally:
            SPANS.append((name, begun, time.monotonic_ns()))

    @functools.wraps(whole)
    async def timed_later(*arguments: Any, **options: Any) -> Any:
        begun = time.monotonic_ns()
        try:
            return await whole(*arguments, **options)
        finally:
            SPANS.append((name, begun, time.monotonic_ns()))

    setattr(owner, function, timed_later if inspect.iscoroutinefunction(whole) else timed)


def rank() -> int:
    from services.decode_worker.ranks import process
    from services.decode_worker.ranks.model import RankModel

    wrap(process, "receive", "wait for a command")
    wrap(process, "_step", "step")
    wrap(process, "_prepared", "arrays")
    wrap(RankModel, "step", "model")
    wrap(process, "_draw", "draw")
    wrap(process, "_send", "answer")
    return process.main()


def leader() -> int:
    from precast.config.settings import DecodeWorkerSettings, load_settings
    from precast.rpc.local_link import LocalLink
    from services.decode_worker.engine.delivery import Delivery
    from services.decode_worker.engine.scheduler import Scheduler
    from services.decode_worker.engine.sizing import shares
    from services.decode_worker.engine.under_way import StepsUnderWay
    from services.decode_worker.main import run
    from services.decode_worker.ranks.group import RankGroup
    from services.decode_worker.ranks.launcher import RankLauncher
    from services.decode_worker.ranks.rank_link import RankLink

    wrap(RankLink, "data_received", "turn")
    wrap(StepsUnderWay, "finish", "take in tokens")
    wrap(Scheduler, "decode_on", "schedule the same batch")
    wrap(Scheduler, "schedule", "schedule anew")
    wrap(RankGroup, "send_frames", "step to socket")
    wrap(Delivery, "tell", "text and message")
    wrap(LocalLink, "send", "message to socket")
    wrap(LocalLink, "send_tokens", "message to socket")
    settings = load_settings(DecodeWorkerSettings)
    module = os.environ.get("PRECAST_BENCH_RANK", "bench._traced")
    return run(settings, RankLauncher(module), shares(settings)[0])


def gateway() -> int:
    from precast.config.settings import GatewaySettings, load_settings
    from precast.rpc.local_link import LocalLink
    from services.gateway.main import run
    from services.gateway.openai import streaming
    from services.gateway.routing.connection import WorkerConnection

    wrap(LocalLink, "data_received", "turn")
    wrap(WorkerConnection, "_handle", "hand out")
    wrap(WorkerConnection, "_handle_tokens", "hand out")
    wrap(streaming._Stream, "show", "render")
    wrap(streaming._Stream, "show_delta", "render")
    wrap(streaming._Sender, "_write", "HTTP to socket")
    wrap(streaming._Sender, "write", "HTTP to socket")
    return run(load_settings(GatewaySettings))


def write(role: str) -> None:
    folder = Path(os.environ["PRECAST_BENCH_TRACE"])
    (folder / f"{role}-{os.getpid()}.json").write_text(json.dumps(list(SPANS)))


def main() -> None:
    role = "rank" if "--fd" in sys.argv else sys.argv[1]
    code = 1
    try:
        code = {"rank": rank, "leader": leader, "gateway": gateway}[role]()
    finally:
        write(role)
        sys.stdout.flush()
        os._exit(code)  # threads of a rank's pool are still there


if __name__ == "__main__":
    main()
