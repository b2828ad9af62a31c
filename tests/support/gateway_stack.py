"""Gateway tests' surroundings: a tiny model folder, and worker and gateway processes."""

import json
import os
import signal
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import grpc
import httpx
import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from precast.config.settings import GatewaySettings, load_settings
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from services.gateway import processes
from services.gateway.main import run
from tests.support import forked
from tests.support.plain_http import PLAIN
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
MODEL = "tiny"
NO_CONSTANTS: Mapping[str, float] = MappingProxyType({})
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refuse me' %}{{ raise_exception('no such talk') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_model_folder(
    models_dir: Path,
    name: str = MODEL,
    *,
    template: str = CHAT_TEMPLATE,
    special: Sequence[str] = (),
) -> Path:
    """A byte-level tokenizer of about 300 tokens and a chat template."""
    folder = models_dir / name
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": template, "eos_token": {"content": "<end>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def eventually(check: Callable[[], Any], deadline_s: float = 60.0) -> Any:
    """What ``check`` returns once it is true."""
    end = time.monotonic() + deadline_s
    while not (value := check()):
        assert time.monotonic() < end, "deadline passed"
        time.sleep(0.02)
    return value


@dataclass(kw_only=True)
class Process:
    """A child process that serves ``port``."""

    process: forked.Process
    port: int

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Worker(Process):
    """A parrot worker."""

    def status(self) -> pb.GetStatusResponse:
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub = DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
            response: pb.GetStatusResponse = stub.GetStatus(pb.GetStatusRequest(), timeout=30)
        return response

    def running(self) -> int:
        return self.status().running

    def served(self) -> int:
        return self.status().graph_steps

    def said(self) -> int:
        """Tokens so far."""
        return self.status().eager_steps


@dataclass(kw_only=True)
class Gateway(Process):
    """A gateway process."""

    metrics_port: int
    authority: Path | None = None
    """Who vouches for its certificate; None: it has none."""

    @property
    def url(self) -> str:
        return f"http{'s' if self.authority else ''}://127.0.0.1:{self.port}"

    @property
    def _verify(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority) if self.authority else PLAIN

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=30,
            http_client=openai.DefaultHttpxClient(verify=self._verify),
            **options,
        )

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=30,
            http_client=openai.DefaultAsyncHttpxClient(verify=self._verify),
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, verify=self._verify)

    def metrics(self) -> dict[str, float]:
        """Values by name and labels, as they are written."""
        text = httpx.get(
            f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30, verify=PLAIN
        ).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=30, verify=self._verify, **arguments)

    def workers(self) -> int:
        """Those that are ready and that it is connected to: others get no requests."""
        answer = self.get("/ready")
        if answer.status_code != 200:
            return 0
        found = answer.json()
        return min(int(found["workers"]), int(found["connected"]))


def serve_gateway(arguments: Sequence[str]) -> int:
    """A gateway, with settings and its modules' constants as JSON."""
    values, constants = map(json.loads, arguments)
    for place, value in constants.items():
        module, _, name = place.rpartition(".")
        assert hasattr(import_module(module), name), place
        setattr(import_module(module), name, value)
    settings = load_settings(GatewaySettings, **values)
    return (run if settings.workers == 1 else processes.run)(settings)


@dataclass(kw_only=True)
class Stack:
    """Starts processes around one Redis and one folder of models."""

    redis_url: str
    models_dir: Path
    started: list[forked.Process]

    def worker(self, **options: Any) -> Worker:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        given = [f"--redis-url={self.redis_url}", f"--models-dir={self.models_dir}"]
        reading, writing = os.pipe()
        with os.fdopen(reading) as said, os.fdopen(writing, "w") as theirs:
            process = self._start("tests.support.parrot_worker:main", *given, *flags, stdout=theirs)
            theirs.close()
            return Worker(process=process, port=int(said.readline()))

    def gateway(
        self,
        *,
        wait_for: int = 1,
        authority: Path | None = None,
        constants: Mapping[str, float] = NO_CONSTANTS,
        **settings: Any,
    ) -> Gateway:
        """A gateway that sees ``wait_for`` ready workers. ``constants``, by ``module.NAME``, are
        for waits that are longer in service than a test should be."""
        port = free_port()
        values = {
            "home": str(self.models_dir.parent),
            "port": port,
            "metrics_port": free_port(),
            "redis_url": self.redis_url,
            "drain_timeout_s": 2,
            "worker_refresh_s": 0.5,
            **settings,
        }
        given = [json.dumps(each) for each in (values, dict(constants))]
        process = self._start(f"{__name__}:serve_gateway", *given)
        gateway = Gateway(
            process=process,
            port=port,
            metrics_port=values["metrics_port"],
            authority=authority,
        )
        eventually(lambda: _is_up(gateway), deadline_s=60)
        eventually(lambda: gateway.workers() >= wait_for)
        return gateway

    def _start(self, *command: str, stdout: IO[str] | None = None) -> forked.Process:
        ours = {key for key in os.environ if key.startswith("PRECAST_")} - {forked.ISA}
        environment = {key: v for key, v in os.environ.items() if key not in ours}
        process = forked.start(command[0], command[1:], stdout=stdout, environment=environment)
        self.started.append(process)
        return process


def _is_up(gateway: Gateway) -> bool:
    assert gateway.process.poll() is None, "the gateway ended"
    try:
        return gateway.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def running_stack(redis_url: str, folder: Path) -> Iterator[Stack]:
    """A stack whose processes are gone afterwards."""
    make_model_folder(folder / "models")
    stack = Stack(redis_url=redis_url, models_dir=folder / "models", started=[])
    try:
        yield stack
    finally:
        for process in stack.started:
            process.kill()
        for process in stack.started:
            process.wait()
