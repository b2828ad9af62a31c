"""A real decode worker as a process, and a client of its gRPC service."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from precast.rpc.tls import NAME, Tls
from tests.support import forked
from tests.support.command import PROGRAM
from tests.support.ports import free_port
from tests.support.processes import words

ROOT = Path(__file__).parents[2]
PRECAST = (str(Path(sys.executable).with_name("precast")),)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request's whole output."""

    token_ids: list[int]
    text: str
    end: pb.GenerateResponse

    @property
    def reason(self) -> int:
        assert self.end.WhichOneof("event") == "finished", self.end
        return self.end.finished.reason


@dataclass(kw_only=True)
class DecodeClient:
    """One Generate stream; requests are multiplexed on it."""

    stub: Any
    _outgoing: "queue.Queue[pb.GenerateRequest | None]" = field(default_factory=queue.Queue)
    _answers: dict[str, "queue.Queue[pb.GenerateResponse]"] = field(default_factory=dict)
    broken: threading.Event = field(default_factory=threading.Event)

    def open(self) -> None:
        responses = self.stub.Generate(iter(self._outgoing.get, None))
        threading.Thread(target=self._read, args=(responses,), daemon=True).start()

    def _read(self, responses: Any) -> None:
        try:
            for response in responses:
                self._answers[response.request_id].put(response)
        except grpc.RpcError:
            self.broken.set()

    def start(self, request_id: str, start: pb.StartGeneration) -> None:
        self._answers[request_id] = queue.Queue()
        self._outgoing.put(pb.GenerateRequest(request_id=request_id, start=start))

    def abort(self, request_id: str) -> None:
        self._outgoing.put(pb.GenerateRequest(request_id=request_id, abort=pb.AbortGeneration()))

    def next(self, request_id: str, timeout_s: float = 60.0) -> pb.GenerateResponse:
        return self._answers[request_id].get(timeout=timeout_s)

    def finish(self, request_id: str, timeout_s: float = 60.0) -> Answer:
        """Everything up to the request's end."""
        tokens: list[int] = []
        text = ""
        deadline = time.monotonic() + timeout_s
        while True:
            response = self.next(request_id, max(0.01, deadline - time.monotonic()))
            if response.WhichOneof("event") != "delta":
                return Answer(token_ids=tokens, text=text, end=response)
            tokens += response.delta.token_ids
            text += response.delta.text

    def close(self) -> None:
        self._outgoing.put(None)


@dataclass(kw_only=True)
class DecodeWorker:
    process: forked.Process
    address: str
    log: Path
    model: str
    tls: Tls | None = None

    def stub(self) -> Any:
        return DecodeServiceStub(self._channel())  # type: ignore[no-untyped-call]

    def _channel(self) -> grpc.Channel:
        if self.tls is None:
            return grpc.insecure_channel(self.address)
        options = [("grpc.ssl_target_name_override", NAME)]
        return grpc.secure_channel(self.address, self.tls.of_channel(), options)

    def status(self) -> pb.GetStatusResponse:
        response: pb.GetStatusResponse = self.stub().GetStatus(pb.GetStatusRequest(), timeout=30)
        return response

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.status().state == pb.WORKER_STATE_READY
        except grpc.RpcError:
            return False

    def client(self) -> DecodeClient:
        client = DecodeClient(stub=self.stub())
        client.open()
        return client

    def request(self, prompt: Sequence[int], max_tokens: int, **options: Any) -> pb.StartGeneration:
        sampling = pb.SamplingParams(**options.pop("sampling", {}))
        stop = pb.StopConditions(max_tokens=max_tokens, **options.pop("stop", {}))
        return pb.StartGeneration(
            model=self.model, prompt_token_ids=prompt, sampling=sampling, stop=stop, **options
        )

    def ranks(self) -> list[int]:
        """Pids of the rank processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(pid)
            for pid in children.split()
            if any("decode_worker.ranks.process" in word for word in words(int(pid)))
        ]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def eventually(check: Callable[[], Any], deadline_s: float = 60.0) -> Any:
    """What ``check`` returns once it is true."""
    end = time.monotonic() + deadline_s
    while not (value := check()):
        assert time.monotonic() < end, "deadline passed"
        time.sleep(0.02)
    return value


@contextmanager
def decode_worker(
    home: Path,
    redis_url: str,
    model: str,
    *,
    environment: dict[str, str] | None = None,
    ready_s: float = 90.0,
    address: str | None = None,
    tls: Tls | None = None,
    prefix: tuple[str, ...] = (),
    **settings: Any,
) -> Iterator[DecodeWorker]:
    """``precast decode-worker`` with these settings, ready; stopped at the end.

    ``environment`` is in addition to ours; ``prefix``: words in front of the command, which is
    a fresh process then."""
    address = address or f"127.0.0.1:{free_port()}"
    flags = {"home": home, "redis_url": redis_url, "listen": address, "model": model}
    flags |= {"prefill_buckets": "", **settings}  # tests that need no captures of them ask for none
    log = home / f"decode-{address.rpartition(':')[2]}.log"
    arguments = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in flags.items()
    ]
    variables = {**os.environ, **(environment or {})}
    with log.open("wb") as file:
        command = ["decode-worker", *arguments]
        if prefix:
            fresh = [*prefix, *PRECAST, *command]
            process: forked.Process = subprocess.Popen(
                fresh, cwd=ROOT, stdout=file, stderr=file, env=variables
            )
        else:
            process = forked.start(
                PROGRAM, command, stdout=file, stderr=file, environment=variables
            )
    worker = DecodeWorker(process=process, address=address, log=log, model=model, tls=tls)
    try:
        eventually(worker.is_ready, ready_s)
        yield worker
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
