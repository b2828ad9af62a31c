"""A compile worker whose captures are packages of the test's choice, and real decode workers."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from tests.support.command import precast
from tests.support.compile_worker import WorkerProcess, compile_worker
from tests.support.decode_worker import DecodeClient, DecodeWorker, decode_worker, eventually
from tests.support.models import write_model

MODEL = "tiny"


@dataclass(kw_only=True)
class Fleet:
    home: Path
    redis_url: str
    compiler: WorkerProcess
    _key: str = ""

    @property
    def package(self) -> Path:
        """Captures give a copy of this file."""
        return self.home / "ledger" / "package"

    def decode_worker(self, **settings: Any) -> "AbstractContextManager[DecodeWorker]":
        """A decode worker with one batch size, and a cache of its own if it is given one."""
        return decode_worker(self.home, self.redis_url, MODEL, batch_sizes="1", **settings)

    def recompile(self, timeout_s: float = 60.0) -> list[Any]:
        """Every event of a recompile of the model."""
        with grpc.insecure_channel(self.compiler.address) as channel:
            stub: Any = AdminServiceStub(channel)  # type: ignore[no-untyped-call]
            request = admin_pb.RecompileRequest(model=MODEL, adoption_deadline_s=20)
            return list(stub.Recompile(request, timeout=timeout_s))

    def cli(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """``precast graphs ...`` against the compile worker."""
        return precast("graphs", *arguments, "--address", self.compiler.address)

    def key(self) -> str:
        """Of the only graph; asked for once."""
        if not self._key:
            [graph] = json.loads(self.cli("list", "--json").stdout)
            self._key = str(graph["key"])
        return self._key

    def states(self) -> dict[int, str]:
        """Each version's state."""
        return {row["version"]: row["state"] + "!" * row["pinned"] for row in self._listed()}

    def reason(self, number: int) -> str:
        """Why a version is in its state."""
        [reason] = [row["reason"] for row in self._listed() if row["version"] == number]
        return str(reason)

    def _listed(self) -> Any:
        return json.loads(self.cli("versions", self.key()[:12], "--json").stdout)


def new_home(home: Path, package: Path) -> Path:
    """A home with the tiny model, whose captures give ``package``."""
    write_model(home / "models" / MODEL)
    (home / "ledger").mkdir()
    shutil.copyfile(package, home / "ledger" / "package")
    return home


@contextmanager
def fleet(home: Path, redis_url: str, **settings: Any) -> Iterator[Fleet]:
    """A compile worker over a ``new_home``, without any decode worker yet."""
    with compile_worker(home, redis_url, home / "ledger", **settings) as compiler:
        yield Fleet(home=home, redis_url=redis_url, compiler=compiler)


def version(worker: DecodeWorker) -> int:
    """Of the loaded graph; 0 if there is none."""
    graphs = worker.status().graphs
    return graphs[0].versions[0] if graphs else 0


def runs(worker: DecodeWorker, number: int, deadline_s: float = 20.0) -> None:
    """Wait until the worker has loaded this version."""
    eventually(lambda: version(worker) == number, deadline_s)


def ask(worker: DecodeWorker, tokens: int = 12) -> list[int]:
    """A greedy request's tokens."""
    client = worker.client()
    answer = answer_of(client, worker, tokens)
    client.close()  # else each request leaves two threads and a channel
    return answer


def answer_of(client: DecodeClient, worker: DecodeWorker, tokens: int = 12) -> list[int]:
    client.start("ask", worker.request([1, 2, 3], tokens, stop={"ignore_eos": True}))
    return client.finish("ask").token_ids


@contextmanager
def traffic(worker: DecodeWorker) -> Iterator[list[list[int]]]:
    """Requests all the time, on one stream; every answer must be that of the first one.

    The pause leaves the services that are under test some of the machine.
    """
    done, client = threading.Event(), worker.client()
    answers = [answer_of(client, worker)]

    def keep_asking() -> None:
        while not done.wait(0.01):
            answers.append(answer_of(client, worker))

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        yield answers
    finally:
        done.set()
        thread.join()
        client.close()
    assert answers.count(answers[0]) == len(answers) > 1
