"""Decode workers with graphs, each behind a gateway of its own, on the same cores.

What a setting is worth is measured by two workers that differ in it and take turns: the one that
waits is idle. Graphs are captured once and kept in the home folder.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from precast.models.importing.importer import import_model
from precast.system.redis_server import start_redis
from precast.tokenizer.load import load_tokenizer
from tests.support.compile_worker import compile_worker
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.gateway_stack import Stack

MODEL: Final = "smollm2-135m-instruct"
CAPTURED_S: Final = 1800.0
AS_SERVED: Final[Mapping[str, Any]] = {
    "quantization": "q4_1",
    "batch_sizes": "1,2,4,8,12,16,24,32",
    "prefill_buckets": "16,64,256",
    "no_adapt_graphs": True,
    "kv_blocks": 2048,
}
"""What ``precast serve`` has; but no sizes that come and go while something is measured."""
PROMPTS: Final = Path(__file__).parent / "prompts"
_OPENING: Final = "=== the answer begins ===\n"
_CHAT: Final = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, kw_only=True)
class Server:
    port: int
    """Of the gateway."""
    worker: DecodeWorker


@contextmanager
def home_folder(given: Path | None) -> Iterator[Path]:
    """A home with the demo model: the given one, which keeps graphs between runs, or a new one."""
    with tempfile.TemporaryDirectory() as scratch:
        home = given or Path(scratch)
        models = home / "models"
        models.mkdir(parents=True, exist_ok=True)
        if not (models / MODEL).exists():
            kept = Path(os.environ.get("PRECAST_HOME") or Path(__file__).parents[1] / ".precast")
            (models / MODEL).symlink_to(import_model(MODEL, kept / "models", report=print).path)
        yield home


def capture(home: Path, settings: Mapping[str, Any]) -> None:
    """Until the home folder has all graphs of a worker with these settings."""
    with ExitStack() as stack:
        redis = stack.enter_context(start_redis(home / "redis-capture"))
        stack.enter_context(compile_worker(home, redis.url))
        stack.enter_context(_worker(home, redis.url, settings))


@contextmanager
def servers(home: Path, variants: Sequence[Mapping[str, Any]]) -> Iterator[list[Server]]:
    """One for each variant of ``AS_SERVED``. What they replay is captured before."""
    for variant in variants:
        capture(home, variant)
    with ExitStack() as stack:
        found = []
        for number, variant in enumerate(variants):
            redis = stack.enter_context(start_redis(home / f"redis-{number}"))
            worker = stack.enter_context(_worker(home, redis.url, variant))
            gateways = Stack(redis_url=redis.url, models_dir=home / "models", started=[])
            stack.callback(_end, gateways)
            found.append(Server(port=gateways.gateway(log_level="warning").port, worker=worker))
        yield found


@contextmanager
def _worker(home: Path, redis_url: str, settings: Mapping[str, Any]) -> Iterator[DecodeWorker]:
    whole = {**AS_SERVED, "wait_for_graphs": True, **settings}
    with decode_worker(home, redis_url, MODEL, ready_s=CAPTURED_S, **whole) as worker:
        yield worker


def _end(gateways: Stack) -> None:
    for process in gateways.started:
        process.kill()
        process.wait()


def prompts(home: Path, kind: str) -> list[list[int]]:
    """The folder's prompts of one kind, as chats of the demo model. An answer may have begun: so
    small a model does what it is asked only if it has been led there."""
    tokenizer = load_tokenizer(home / "models" / MODEL)
    texts = [path.read_text().strip() for path in sorted((PROMPTS / kind).glob("*.txt"))]
    parts = [text.partition(_OPENING) for text in texts]
    chats = [_CHAT.format(text=text.strip()) + begun.rstrip() for text, _, begun in parts]
    return [tokenizer.encode(chat).ids for chat in chats]
