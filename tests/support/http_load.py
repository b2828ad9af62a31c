"""Completions over HTTP that follow each other, and how each one ended.

Every other request is streamed. A request that takes longer than ``DEADLINE_S`` has hung.
"""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.plain_http import PLAIN

DEADLINE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request's end: ``finished``, an ``error`` of the API, or ``lost`` with its connection."""

    text: str = ""
    finished: bool = False
    error: dict[str, Any] | None = None
    """OpenAI's error object."""
    status: int = 0
    lost: str = ""
    streamed: bool = False
    seconds: float = 0.0


@dataclass(kw_only=True)
class Load:
    """Greedy completions of one prompt by ``clients`` at once while in the ``with`` block."""

    url: str
    model: str
    prompt: str
    max_tokens: int
    clients: int = 3
    pause_s: float = 0.0
    """Between two requests of a client."""
    outcomes: list[Outcome] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._stop.clear()
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(self.clients)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE_S)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def stop(self) -> None:
        """Ask nothing more; what was asked goes on to its end."""
        self._stop.set()

    def good(self) -> int:
        """How many requests have finished so far."""
        return sum(outcome.finished for outcome in list(self.outcomes))

    def _run(self, number: int) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)  # a new gateway has other connections
        with httpx.Client(
            timeout=DEADLINE_S, limits=limits, trust_env=False, verify=PLAIN
        ) as client:
            for count in itertools.count(number):
                if self._stop.wait(self.pause_s):
                    return
                self.outcomes.append(self.ask(client, stream=count % 2 == 0))

    def ask(self, client: httpx.Client, *, stream: bool) -> Outcome:
        body = {"model": self.model, "prompt": self.prompt, "max_tokens": self.max_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": stream}
        begun = time.monotonic()
        try:
            with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                found = _read_stream(answer) if stream else _read_whole(answer)
        except httpx.TransportError as error:
            found = {"lost": repr(error)}
        return Outcome(**found, streamed=stream, seconds=time.monotonic() - begun)


def _read_whole(answer: httpx.Response) -> dict[str, Any]:
    body = json.loads(answer.read())
    if answer.status_code != 200:
        return {"status": answer.status_code, "error": body["error"]}
    [choice] = body["choices"]
    return {"status": 200, "text": choice["text"], "finished": bool(choice["finish_reason"])}


def _read_stream(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != 200:
        return _read_whole(answer)
    text, error, done = "", None, False
    for event in _events(answer):
        if event == "[DONE]":
            done = True
            continue
        message = json.loads(event)
        error = message.get("error", error)
        text += "".join(choice["text"] for choice in message.get("choices", ()))
    return {"status": 200, "text": text, "error": error, "finished": done}


def _events(answer: httpx.Response) -> Iterator[str]:
    for line in answer.iter_lines():
        if line and not line.startswith(":"):  # a comment: the stream waits
            assert line.startswith("data: "), line
            yield line.removeprefix("data: ")


def check_outcomes(outcomes: list[Outcome], *, may_lose: bool = False) -> None:
    """Every request ended in time: whole, or with an error of OpenAI's shape.

    ``may_lose``: the gateway was killed, so that connections may have been lost.
    """
    for outcome in outcomes:
        assert outcome.seconds < DEADLINE_S, outcome
        if outcome.finished:
            assert outcome.text and outcome.error is None, outcome
        elif outcome.error is not None:
            assert outcome.error.keys() == {"message", "type", "param", "code"}, outcome
            assert outcome.error["message"] and outcome.error["type"] == "server_error", outcome
            assert outcome.status == 200 or outcome.status >= 500, outcome
        else:
            assert may_lose and outcome.lost, outcome
