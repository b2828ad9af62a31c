"""A leader's step loop without processes: ranks and clients that are objects."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from precast.ops.draw_status import DrawStatus
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.step_tokens import StepTokens
from precast.tokenizer.detokenizer import Detokenizer
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.engine.delivery import Delivery
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.response_buffer import Outbox, Recipient
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import SamplingSpec
from services.decode_worker.engine.sequence import Sequence as Tokens
from services.decode_worker.engine.step_loop import StepLoop
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    DecodeOn,
    StartSampling,
    Step,
    StepDone,
    decode_command,
)
from services.decode_worker.ranks.sent_steps import SentSteps
from tests.support.simulated_rank import _draw, following

BLOCK = 8
STEP_S = 0.0005
"""What a step says that it took."""
TURNS = 20


class GroupLost(Exception):
    pass


class Ranks:
    """A group whose tokens depend on positions alone. It dies after so many steps, and can't draw
    the last token of one of them."""

    def __init__(self, lives: int = 10**9, fails: int = -1) -> None:
        self.sent_steps = SentSteps(list, self._fail)
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.commands: list[tuple[type, bytes, bytes]] = []
        """What it was sent: the kind, the new blocks or the tables, and where it stands then."""
        self._lives = lives
        self._fails = fails
        self._last: Step | None = None
        self._tables: list[list[int]] = []
        self._due: list[StepDone] = []

    def send_step(
        self, step: Step | DecodeOn, sampling: Sequence[StartSampling] = (), *, timeout_s: float
    ) -> None:
        whole = self._whole(step)
        shown = step.blocks if isinstance(step, DecodeOn) else step.block_tables
        self.commands.append((type(step), shown, whole.context_lens))
        self.sent_steps.add(timeout_s)
        self._due.append(_draw(whole, STEP_S))
        if len(self._due) == 1:
            self._compute()

    def send_frames(self, frames: bytes, timeout_s: float) -> None:
        step = decode_command(frames[FRAME_HEADER.size :])
        assert isinstance(step, DecodeOn)
        self.send_step(step, timeout_s=timeout_s)

    async def step_done(self) -> StepDone:
        done = await self.sent_steps.done()
        if done is None:
            raise GroupLost
        return done

    async def ping(self) -> None:
        pass

    def failure(self) -> Exception:
        return GroupLost()

    def _whole(self, step: Step | DecodeOn) -> Step:
        """In full; each sequence has blocks for its tokens."""
        if isinstance(step, DecodeOn):
            assert self._last is not None
            for place, block in np.frombuffer(step.blocks, np.int32).reshape(-1, 2).tolist():
                self._tables[place].append(block)
            step = following(self._last, step)
        else:
            tables = np.frombuffer(step.block_tables, np.int32)
            self._tables = tables.reshape(-1, step.block_table_width).tolist()
        self._last = step if step.goes_on else None
        lengths = np.frombuffer(step.context_lens, np.int32)
        for table, tokens in zip(self._tables, lengths, strict=True):
            assert len(table) * BLOCK >= tokens
        return step

    def _compute(self, turns: int = TURNS) -> None:
        """For some turns of the loop: a time would be over too soon where the machine is busy."""
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._compute, turns - 1)
        else:
            loop.call_soon(self._answer)

    def _answer(self) -> None:
        done = self._due.pop(0)
        if self._due:
            self._compute()
        self._lives -= 1
        self._fails -= 1
        if self._fails == 0:
            last = len(done.token_ids) - 1
            ids = [*done.token_ids[:-1], -1]
            done = msgspec.structs.replace(
                done, token_ids=ids, failed={last: int(DrawStatus.NOT_FINITE)}
            )
        if self._lives < 0:
            self._fail("died")
        elif not self.failed.done():
            self.sent_steps.answered(done)

    def _fail(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_result(reason)
            self.sent_steps.end()


@dataclass(kw_only=True)
class Client:
    """What a gateway of the same host reads."""

    is_writable: bool = True
    kinds: bool = True
    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, Any] = field(default_factory=dict)
    on_token: Callable[[int, int], None] = lambda _handle, _count: None
    """Told of the handle, and how many it has."""

    def send_tokens(self, step: StepTokens) -> None:
        self._take(step.handles, step.token_counts, step.token_ids, step.texts)

    def send(self, message: pb.GenerateResponse) -> None:
        step = message.step
        self._take(step.handles, step.token_counts, step.token_ids, step.texts)
        for end in step.ends:
            assert end.handle not in self.ends
            self.ends[end.handle] = end.finished if end.HasField("finished") else end.error

    def _take(self, handles: Any, counts: Any, token_ids: Any, texts: Any) -> None:
        rest = list(token_ids)
        for handle, count, text in zip(handles, counts, texts, strict=True):
            assert handle not in self.ends
            self.tokens.setdefault(handle, []).extend(rest[:count])
            self.texts[handle] = self.texts.get(handle, "") + text
            rest = rest[count:]
            self.on_token(handle, len(self.tokens[handle]))


class Leader:
    """A step loop without processes."""

    def __init__(
        self, table: TokenTable, graph_sizes: Sequence[int] = (), *, blocks: int = 64
    ) -> None:
        pace = Pace(0.15)
        self.table = table
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            blocks=blocks,
            block_size=BLOCK,
            max_batch_size=8,
            max_context_length=256,
            max_waiting=8,
            prefill_chunk=64,
            pace=pace,
            graph_sizes=lambda: graph_sizes,
        )
        self.delivery = Delivery(self.scheduler, self.metrics)
        self.loop = StepLoop(
            scheduler=self.scheduler,
            delivery=self.delivery,
            graphs=GraphManager((), lambda: None),
            metrics=self.metrics,
            pace=pace,
        )
        self.client = Client()
        self.outbox = Outbox(columns=True)
        self.outbox.attach(self.client)

    def add(
        self,
        handle: int,
        prompt: list[int],
        max_tokens: int,
        *,
        stops: Sequence[str] = (),
        ends: Sequence[int] = (),
        at_end: bool = False,
        logprobs: int = -1,
    ) -> Request:
        sequence = Tokens(
            request_id=str(handle),
            prompt=prompt,
            sampling=SamplingSpec(logprobs=logprobs),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(ends),
        )
        request = Request(
            sequence=sequence,
            recipient=Recipient(request_id=str(handle), handle=handle),
            detokenizer=Detokenizer(self.table, prompt, stops),
            tokens=self.table,
            outbox=self.outbox,
            on_end=lambda _: None,
            hidden_token_ids=frozenset(ends),
            deliver_at_end=at_end,
        )
        self.scheduler.add(sequence)
        self.delivery.add(request)
        self.loop.nudge()
        return request

    async def until(self, ended: int, ranks: Ranks) -> None:
        """Until so many requests have ended."""
        running = asyncio.create_task(self.loop.run(ranks))  # type: ignore[arg-type]  # what it asks for
        async with asyncio.timeout(20):
            while len(self.client.ends) < ended and not running.done():
                await asyncio.sleep(0)
        if not running.done():
            running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    @property
    def steps(self) -> float:
        """That metrics know of."""
        return sum(self.metrics._seconds.of("decode").counts)
