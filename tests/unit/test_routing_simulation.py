"""The policy in simulation: chats find their history, and work is spread as well as it can be."""

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.routing.load import LEAST_WORK, Load
from services.gateway.routing.policy import Candidate, Demand, choose
from services.gateway.routing.prefixes import BLOCK, Prefix, PrefixIndex, prefix_of

WORKERS = 4
CHATS, TURNS = 64, 8
AT_ONCE = 24
BLOCKS = 1024
"""Of each worker's cache."""
SPEED = 160
"""Tokens that a worker computes in a tick, for all of its requests together."""


@dataclass(kw_only=True)
class Cache:
    """A worker's blocks, each known by its tokens and the block before it, exactly."""

    most: int
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)
    names: ClassVar[dict[tuple[int, ...], int]] = {}

    def path(self, tokens: list[int]) -> list[int]:
        found = [0]
        for start in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
            block = (found[-1], *tokens[start : start + BLOCK])
            found.append(self.names.setdefault(block, len(self.names) + 1))
        return found[1:]

    def found(self, tokens: list[int]) -> int:
        there = (name in self.blocks for name in self.path(tokens))
        return BLOCK * len(list(takewhile(bool, there)))

    def add(self, tokens: list[int]) -> None:
        for name in reversed(self.path(tokens)):
            self.blocks[name] = None
            self.blocks.move_to_end(name)
        while len(self.blocks) > self.most:
            self.blocks.popitem(last=False)


@dataclass(kw_only=True)
class SimulatedWorker:
    name: str
    cache: Cache
    load: Load = field(default_factory=Load)
    index: PrefixIndex = field(default_factory=PrefixIndex)

    def candidate(self, prefix: Prefix) -> Candidate:
        return Candidate(
            worker_id=self.name,
            tier=0,
            work=self.load.work(0.0),
            capacity=16,
            max_context_length=8192,
            last_chosen=self.load.last_chosen,
            prefix=self.index.found(prefix.hashes),
        )


@dataclass(kw_only=True)
class Chat:
    history: list[int]
    """With the next turn's question."""
    earlier: int = 0
    """Tokens of the turns before that."""
    turns: int = 0


@dataclass(kw_only=True)
class Turn:
    chat: Chat
    worker: SimulatedWorker
    prefix: Prefix
    answer: list[int]
    left: int


def simulate(dice: random.Random, blocks: int) -> tuple[int, int]:
    """Tokens of earlier turns that were in the chosen worker's cache, and all of them."""
    workers = [
        SimulatedWorker(name=str(n), cache=Cache(most=blocks), index=PrefixIndex(most=blocks))
        for n in range(WORKERS)
    ]
    system = [1] * dice.choice((0, 70))
    chats = [Chat(history=system + words(dice, 40, 200)) for _ in range(CHATS)]
    quiet, running = list(chats), list[Turn]()
    found = known = clock = 0
    while quiet or running:
        while quiet and len(running) < AT_ONCE:
            clock += 1
            chat = quiet.pop(dice.randrange(len(quiet)))
            turn, cached = begin(dice, chat, workers, clock)
            running.append(turn)
            earlier = chat.earlier // BLOCK * BLOCK
            known += earlier
            found += min(cached, earlier)
        for turn in compute(running):
            running.remove(turn)
            end(dice, turn)
            if turn.chat.turns < TURNS:
                quiet.append(turn.chat)
    return found, known


def words(dice: random.Random, least: int, most: int) -> list[int]:
    return [dice.randrange(50_000) for _ in range(dice.randint(least, most))]


def begin(
    dice: random.Random, chat: Chat, workers: list[SimulatedWorker], clock: int
) -> tuple[Turn, int]:
    prefix = prefix_of(chat.history)
    answer = words(dice, 20, 200)
    demand = Demand(prompt=len(chat.history), output=len(answer))
    choice = choose((worker.candidate(prefix) for worker in workers), demand)
    assert choice is not None
    worker = workers[int(choice.worker_id)]
    cached = worker.cache.found(chat.history)
    worker.index.add(prefix.hashes)
    worker.cache.add(chat.history)
    left = max(1, len(chat.history) - cached) + len(answer)
    worker.load.reserve(clock, left)
    return Turn(chat=chat, worker=worker, prefix=prefix, answer=answer, left=left), cached


def compute(running: list[Turn]) -> list[Turn]:
    """One tick; the turns that have ended."""
    for worker in {turn.worker.name: turn.worker for turn in running}.values():
        mine = [turn for turn in running if turn.worker is worker]
        for turn in mine:
            done = min(turn.left, max(1, SPEED // len(mine)))
            turn.left -= done
            worker.load.left -= done
    return [turn for turn in running if turn.left == 0]


def end(dice: random.Random, turn: Turn) -> None:
    chat = turn.chat
    turn.worker.load.release()
    turn.worker.index.add(turn.prefix.followed_by(turn.answer).hashes)
    chat.history += turn.answer
    turn.worker.cache.add(chat.history)
    chat.earlier = len(chat.history)
    chat.history += words(dice, 10, 80)
    chat.turns += 1


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_chats_find_their_history(seed: int) -> None:
    """64 chats of 8 turns over 4 workers: nine tenths of their tokens are in the cache of the
    worker that they come to. The rest moved away from a busy one."""
    found, known = simulate(random.Random(seed), BLOCKS)
    assert found >= 0.9 * known


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(100, 300))
def test_work_is_spread_as_well_as_it_can_be(seed: int, count: int) -> None:
    """Requests that come at once: the busiest worker has no more than 1.1 times what it would have
    in the best assignment, which is no less than the mean."""
    dice = random.Random(seed)
    loads = [Load() for _ in range(WORKERS)]
    total = 0
    for clock in range(1, count + 1):
        demand = Demand(prompt=dice.randint(1, 1000), output=dice.randint(1, 500))
        work = demand.prompt + demand.output
        candidates = [
            Candidate(
                worker_id=str(n),
                tier=0,
                work=load.work(0.0) - LEAST_WORK * load.reserved,
                capacity=16,
                max_context_length=8192,
                last_chosen=load.last_chosen,
            )
            for n, load in enumerate(loads)
        ]
        choice = choose(candidates, demand)
        assert choice is not None
        loads[int(choice.worker_id)].reserve(clock, work)
        total += work
    busiest = max(load.work(0.0) - LEAST_WORK * load.reserved for load in loads)
    assert busiest <= 1.1 * total / WORKERS
