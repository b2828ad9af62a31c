"""Several gateway processes on one port: kills, limits, stops.

To know which process takes a request, the others are stopped while it is sent: one that is stopped
accepts nothing.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from precast.access.api_keys import NewKey, create
from precast.system.redis_server import start_redis
from services.gateway.in_flight import InFlight
from tests.support.gateway_stack import Gateway, Stack, eventually, running_stack
from tests.support.plain_http import PLAIN
from tests.support.ports import free_ports

COUNT = 2
MOST = 3
"""Requests at once, of all processes together."""
SLOW = {"model": "tiny", "prompt": "!slow", "stream": True}
QUICK = {"model": "tiny", "prompt": "the fox", "max_tokens": 2}
DEADLINE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class House:
    """Gateways of one start, and keys for them."""

    gateway: Gateway
    key: str
    narrow: str
    """A key for one request at a time."""

    @property
    def processes(self) -> list[psutil.Process]:
        children = psutil.Process(self.gateway.process.pid).children()
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]

    @contextmanager
    def only(self, process: psutil.Process) -> Iterator[None]:
        """This process alone takes what is sent meanwhile."""
        others = [one for one in self.processes if one.pid != process.pid]
        with ExitStack() as stopped:
            for one in others:
                one.send_signal(signal.SIGSTOP)
                stopped.callback(one.send_signal, signal.SIGCONT)
                eventually(lambda one=one: one.status() == psutil.STATUS_STOPPED)
            yield

    def ask(self, process: psutil.Process, key: str = "") -> httpx.Response:
        with self.only(process):
            return self.gateway.post("/v1/completions", json=QUICK, headers=bearer(key or self.key))

    @contextmanager
    def stream(
        self, process: psutil.Process, key: str = "", tokens: int = 200
    ) -> Iterator[Iterator[str]]:
        """An answer of this process that has begun, ten tokens a second; its further lines."""
        url = f"{self.gateway.url}/v1/completions"
        headers = bearer(key or self.key)
        with ExitStack() as open_:
            with self.only(process):
                body = SLOW | {"max_tokens": tokens}
                sent = httpx.stream(
                    "POST", url, json=body, headers=headers, timeout=DEADLINE_S, verify=PLAIN
                )
                lines = open_.enter_context(sent).iter_lines()
                assert next(lines).startswith("data: ")
            yield lines


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("processes")
    keys = home / "keys" / "api"
    key, narrow = (
        create(keys, NewKey(name=name, max_concurrent=most))[0]
        for name, most in (("wide", None), ("narrow", 1))
    )
    with start_redis(home / "redis") as redis, running_stack(redis.url, home) as stack:
        stack.worker()
        yield House(gateway=gateways(stack), key=key, narrow=narrow)


def gateways(stack: Stack) -> Gateway:
    return stack.gateway(
        workers=COUNT, metrics_port=free_ports(COUNT)[0], max_in_flight=MOST, request_timeout_s=60
    )


def test_each_serves_and_one_that_is_killed_is_replaced_beside_the_others(house: House) -> None:
    killed, other = house.processes
    assert [house.ask(one).status_code for one in (killed, other)] == [200, 200]
    with house.stream(other, tokens=15) as lines:
        killed.kill()
        new = eventually(lambda: [p for p in house.processes if p not in (killed, other)])
        assert house.ask(new[0]).status_code == 200
        assert list(lines)[-2] == "data: [DONE]"
    assert house.processes == [other, *new]
    assert house.gateway.process.poll() is None


def test_requests_at_once_are_bounded_together(house: House) -> None:
    first, second = house.processes
    with house.stream(first), house.stream(second), house.stream(second):
        answers = [house.ask(one) for one in (first, second)]
        assert [answer.status_code for answer in answers] == [429, 429]
        assert f"{MOST} requests are running" in answers[0].json()["error"]["message"]
    eventually(lambda: house.ask(first).status_code == 200)


def test_a_key_s_limit_holds_at_all_of_them(house: House) -> None:
    first, second = house.processes
    with house.stream(first, house.narrow):
        refused = house.ask(second, house.narrow)
        assert (refused.status_code, house.ask(second).status_code) == (429, 200)
    eventually(lambda: house.ask(second, house.narrow).status_code == 200)


def test_each_has_metrics_of_its_own(house: House) -> None:
    served = 'gateway_requests_total{endpoint="/v1/completions",status="200"}'

    def counts() -> list[float]:
        first = house.gateway.metrics_port
        pages = [
            httpx.get(f"http://127.0.0.1:{first + n}/metrics", verify=PLAIN).text
            for n in range(COUNT)
        ]
        return [sum(float(x.split()[-1]) for x in p.splitlines() if served in x) for p in pages]

    before = counts()
    house.ask(house.processes[0])
    assert sum(counts()) == sum(before) + 1


def test_all_end_with_a_stop_and_with_their_parent(house: House, tmp_path: Path) -> None:
    processes = house.processes
    with house.stream(processes[0]):
        house.gateway.process.send_signal(signal.SIGTERM)
        assert house.gateway.process.wait(DEADLINE_S) == 0
    assert not [one for one in processes if one.is_running()]


def test_one_that_ended_leaves_nothing_of_its_count() -> None:
    counts = InFlight(2)
    counts.begin(1)
    with counts.one_more():
        assert (counts.mine, counts.all) == (1, 1)
        counts.begin(0)
        assert (counts.mine, counts.all) == (0, 1)
        counts.begin(1)
        assert counts.all == 0
        counts.begin(0)
