"""A real S3 server as a process: moto's, in memory.

``python -m tests.support.s3_server PORT`` is one. It does one request at a time, for moto's own
conditional writes are not atomic among threads.
"""

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.support.compile_worker import ROOT, wait_until
from tests.support.ports import free_port

_numbers = count(1)


@dataclass(frozen=True, kw_only=True)
class S3Server:
    process: "subprocess.Popen[bytes]"
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """What its clients need."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def new_store(self) -> str:
        """The URL of an empty prefix in a bucket of its own."""
        name = f"bucket-{next(_numbers)}"
        self.make_bucket(name)
        return f"s3://{name}/some/graphs"

    def make_bucket(self, name: str) -> None:
        self.call("PUT", name)

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """An unsigned request: the server asks for no credentials."""
        request = urllib.request.Request(f"{self.endpoint}/{path}", data=body, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def s3_server(folder: Path, port: int = 0) -> Iterator[S3Server]:
    """An empty server; ended at the end."""
    port = port or free_port()
    command = [sys.executable, "-m", __name__, str(port)]
    with (folder / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    server = S3Server(process=process, endpoint=f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: answers(server))
        yield server
    finally:
        process.kill()
        process.wait()


def answers(server: S3Server) -> bool:
    try:
        return bool(server.call("GET", "moto-api/"))
    except OSError:
        return False


if __name__ == "__main__":
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=False)
