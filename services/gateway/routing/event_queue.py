"""What the choices of one request have received and its HTTP response hasn't sent yet.

Workers' connections fill it, each shared by many requests, so filling never waits. It is bounded by
merging: once ``MAX_EVENTS`` deltas of a choice wait for a slow client, later ones are added to the
last. A slow client gets fewer, larger chunks, and costs no more memory than its own output.

While the response has nothing else to do it may ``follow``: deltas then go to it in the turn that
brings them, and no task is woken for one.

Tokens that are no whole character yet are held back until text comes: a request that fails before
anything of it was shown has a status of its own.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from precast.errors import PrecastError
from precast.proto.decode.v1.decode_service_pb2 import GenerationFinished, TokenLogprob

MAX_EVENTS: Final = 64


@dataclass(kw_only=True, slots=True)
class Delta:
    """Tokens of a choice, and the text that they complete. Later ones may be added to it."""

    tokens: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    """As many as ``tokens``."""
    logprobs: Sequence[TokenLogprob] = ()
    """None, or one for each token."""
    prompt_logprobs: Sequence[TokenLogprob] = ()
    """Of the next tokens of the prompt; all of them come before the first token."""

    def add(self, later: "Delta") -> None:
        self.tokens += later.tokens
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs:
            self.logprobs = [*self.logprobs, *later.logprobs]
        if later.prompt_logprobs:
            self.prompt_logprobs = [*self.prompt_logprobs, *later.prompt_logprobs]


Event = Delta | GenerationFinished
Follower = Callable[[int, Delta], bool]
"""Takes a delta of a choice; false: it can't take it now."""
TextFollower = Callable[[int, int, str, float], bool]
"""The same for what nearly every delta is, text and how many tokens it is of; with the time at
which it came (monotonic, s)."""


class EventQueue:
    """Events of one request, of each choice in order: deltas, then one finished."""

    def __init__(self, choices: int, on_lost: Callable[[int, PrecastError], bool]) -> None:
        """``on_lost(index, error)`` is asked when a choice fails: true means that it goes on."""
        self._on_lost = on_lost
        self._ready: list[tuple[int, Event]] = []
        self._held: list[Delta | None] = [None] * choices
        """What each choice has received that shows nothing yet."""
        self._shown = [False] * choices
        self._waiting: list[list[Delta]] = [[] for _ in range(choices)]
        """The deltas in ``_ready``, by choice."""
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None
        self._follower: Follower | None = None
        self._text_follower: TextFollower | None = None
        self._wait_s = 0.0
        self._since = 0.0
        """When the reader began to wait, or the follower took the last delta (monotonic, s)."""
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When it looks, by the loop's clock. uvloop's timers don't say it where it is at once."""

    def follow(self, follower: Follower, texts: TextFollower | None = None) -> None:
        """``follower`` gets deltas that come while somebody waits in ``take``, which goes on
        waiting. Ends, errors, and what it doesn't take are for ``take``. ``texts``, if there is
        one, gets those in its place that are text and nothing else."""
        self._follower, self._text_follower = follower, texts

    def put_text(self, index: int, token_ids: list[int], text: str, now: float) -> None:
        """``put`` of tokens and their text, which came at ``now``. What is touched for a token is
        what it costs, so the usual way of it is all here."""
        follower, reader = self._text_follower, self._reader
        waited_for = reader is not None and not reader.done() and not self._ready
        if follower is not None and waited_for and text and self._shown[index]:
            try:
                followed = follower(index, len(token_ids), text, now)
            except Exception as error:  # the request's fault, and not its worker's
                self.fail(error)
                return
            if followed:
                self._since = now
                return
        self.put(index, Delta(tokens=len(token_ids), text=text, token_ids=token_ids))

    def put(self, index: int, delta: Delta) -> None:
        if self._shown[index]:
            if self._follower is None or self._ready or not self._followed(index, delta):
                self._add(index, delta)
            return
        held = self._held[index]
        if held is not None:
            held.add(delta)
            delta = held
        self._shown[index] = bool(delta.text)
        self._held[index] = None if delta.text else delta
        if delta.text:
            self._add(index, delta)

    def finish(self, index: int, finished: GenerationFinished) -> None:
        held = self._held[index]
        if held is not None:
            self._add(index, held)
        self._held[index], self._shown[index] = None, True
        self._ready.append((index, finished))
        self._wake()

    def lose(self, index: int, error: PrecastError) -> None:
        """The choice's worker has failed or refused it."""
        if self._error is None and not self._on_lost(index, error):
            self.fail(error)

    def begin_anew(self, index: int) -> None:
        """Forget what was held back: the choice comes from its beginning."""
        self._held[index] = None

    def fail(self, error: Exception) -> None:
        """End the whole request, after what has come already. The first error counts."""
        self._error = self._error or error
        self._wake()

    async def take(self, timeout_s: float) -> list[tuple[int, Event]]:
        """What has come, with each event's choice; empty if nothing does within the time.

        Raises the error that ended the request, after its events.
        """
        if not self._ready and self._error is None:
            await self._wait(timeout_s)
        taken, self._ready = self._ready, []
        for waiting in self._waiting:
            waiting.clear()
        if not taken and self._error is not None:
            raise self._error
        return taken

    def _followed(self, index: int, delta: Delta) -> bool:
        """Whether the follower has taken it, in front of which nothing waits."""
        reader = self._reader
        if reader is None or reader.done():
            return False
        assert self._follower is not None
        try:
            followed = self._follower(index, delta)
        except Exception as error:  # the request's fault, and not its worker's
            self.fail(error)
            return True
        if followed:
            self._since = time.monotonic()
        return followed

    def _add(self, index: int, delta: Delta) -> None:
        waiting = self._waiting[index]
        if len(waiting) >= MAX_EVENTS:
            waiting[-1].add(delta)
            return
        waiting.append(delta)
        self._ready.append((index, delta))
        self._wake()

    def close(self) -> None:
        """Nobody takes events any more."""
        if self._timer is not None:
            self._timer.cancel()

    async def _wait(self, timeout_s: float) -> None:
        """Until something comes, or the time is over. This is waited for at every token, so one
        timer serves many waits: it looks whether the last of them has lasted too long."""
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        self._since, self._wait_s = time.monotonic(), timeout_s
        if self._timer is None or self._due > loop.time() + timeout_s:
            self.close()
            self._look_in(timeout_s, loop)
        try:
            await self._reader
        finally:
            self._reader = None

    def _look_in(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + seconds
        self._timer = loop.call_later(seconds, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        left = self._since + self._wait_s - time.monotonic()
        if self._reader is not None and left > 0:
            self._look_in(left, loop)
        else:
            self._timer = None
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
