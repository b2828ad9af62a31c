"""From a request's grammar to a matcher, off the event loop: tried in a process of its own first,
then compiled in a thread. What was compiled, or refused, is remembered."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

from precast.errors import InvalidRequest, Overloaded, Unavailable
from services.decode_worker.constraints.checker import TOO_LONG, Setup
from services.decode_worker.constraints.checking import GrammarChecker
from services.decode_worker.constraints.grammar import Grammar, refusal
from services.decode_worker.constraints.matcher import Matcher, Vocabulary

T = TypeVar("T")
CACHED: Final = 64
"""Grammars that are remembered."""
OPEN_S: Final = 30.0
"""How long the first requests of a worker may wait for it to know its tokens."""
WAITING: Final = 32
"""Grammars that may wait for being compiled; each takes up to two seconds."""
THREADS: Final = 2
"""That compile grammars: what else the worker does in threads does not wait for them."""


class ConstraintCompiler:
    def __init__(self, setup: Callable[[], Setup]) -> None:
        """``setup`` is called once, in a thread."""
        self._setup = setup
        self._checker: GrammarChecker | None = None
        self._vocabulary: Vocabulary | None = None
        self._unavailable = ""
        """Why nothing can be constrained."""
        self._opened = asyncio.Event()
        self._known: OrderedDict[Grammar, Matcher | str] = OrderedDict()
        """Matchers at their beginning, or why there is none; those asked for last at the end."""
        self._compiling: dict[Grammar, asyncio.Task[Matcher | str]] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="constraints")

    async def open(self) -> None:
        """Learns the model's tokens, once, before there are requests: for a second no other Python
        thread runs, the event loop's neither."""
        try:
            await self._in_thread(self._learn)
        finally:
            self._opened.set()

    def _learn(self) -> None:
        setup = self._setup()
        try:
            self._vocabulary = Vocabulary(setup.tokenizer, setup.vocab_size, setup.eos_token_ids)
            self._checker = GrammarChecker(setup)
        except ImportError:
            self._unavailable = "llguidance is not installed"
        except ValueError as error:
            self._unavailable = f"its tokenizer is of no kind that grammars know: {error}"

    async def warm(self) -> None:
        """Starts what tries grammars, so that the first one need not wait for it."""
        if self._checker is not None:
            with suppress(Unavailable):  # then requests are told
                await self._checker.start()

    def known(self, grammar: Grammar) -> Matcher | None:
        """A matcher at the grammar's beginning if it is remembered. Raises InvalidRequest if it is
        remembered as refused, or nothing can be constrained."""
        if self._unavailable:
            raise InvalidRequest(f"constraint: this worker can't constrain: {self._unavailable}")
        found = self._known.get(grammar)
        if found is None:
            return None
        self._known.move_to_end(grammar)
        return _copy(found)

    async def compile(self, grammar: Grammar) -> Matcher:
        """Raises InvalidRequest, Overloaded or Unavailable."""
        if (found := self.known(grammar)) is not None:
            return found
        task = self._compiling.get(grammar)
        if task is None:
            if len(self._compiling) >= WAITING:
                raise Overloaded(f"{WAITING} constraints wait for being compiled already")
            task = asyncio.create_task(self._remember(grammar))
            self._compiling[grammar] = task
            task.add_done_callback(lambda _: self._compiling.pop(grammar, None))
        # others may want it too, or later, whatever becomes of this request
        return _copy(await asyncio.shield(task))

    async def close(self) -> None:
        for task in self._compiling.values():
            task.cancel()
        await asyncio.gather(*self._compiling.values(), return_exceptions=True)
        if self._checker is not None:
            self._checker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _remember(self, grammar: Grammar) -> Matcher | str:
        await self._until_open()
        assert self._checker is not None
        assert self._vocabulary is not None
        found: Matcher | str = await self._checker.check(grammar)
        if not found:
            found = await self._in_thread(partial(self._vocabulary.compile, grammar))
            if found.error:
                found = refusal(grammar.kind, found.error)
        if isinstance(found, str) and found.endswith(TOO_LONG):
            return found  # at another time it may be quicker
        self._known[grammar] = found
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return found

    async def _until_open(self) -> None:
        """Raises Unavailable or InvalidRequest."""
        try:
            await asyncio.wait_for(self._opened.wait(), OPEN_S)
        except TimeoutError:
            raise Unavailable("the worker does not know its model's tokens yet") from None
        if self._unavailable:
            raise InvalidRequest(f"constraint: this worker can't constrain: {self._unavailable}")


def _copy(found: Matcher | str) -> Matcher:
    if isinstance(found, str):
        raise InvalidRequest(found)
    return found.copy()
