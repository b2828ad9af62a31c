"""A decode worker as the gateway sees it: its last lease, its connection, and its load.

Its connection knows best. A worker that answers on its stream is alive, whatever Redis says of its
lease: a busy host renews late, and a Redis that is down or full renews nothing. A worker is gone
when it doesn't answer *and* its lease has ended.
"""

import time
from collections.abc import Callable
from typing import Final

from precast.errors import PrecastError
from precast.fleet.leases import DecodeLease, WorkerState
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.tls import Tls
from services.gateway.routing.breaker import Breaker
from services.gateway.routing.connection import Ended, Place, WorkerConnection
from services.gateway.routing.load import Load, UsualOutput
from services.gateway.routing.policy import Candidate
from services.gateway.routing.prefixes import BLOCK, MAX_BLOCKS, Hashes, PrefixIndex

log = get_logger(__name__)

MISSING_GRACE_S: Final = 3.0
"""A worker that doesn't answer is gone only when its lease has been missing this long in answers of
Redis. A Redis that comes back empty lacks every lease until the workers' next beat."""
FORGET_S: Final = 60.0
"""How long a worker that is gone is still tried: a Redis that takes no writes doesn't tell of one
that was restarted at the same address."""
_BLOCK_SIZE: Final = 32
"""Tokens of a worker's block; leases don't tell."""
_STATES: Final[dict[int, WorkerState]] = {
    pb.WORKER_STATE_STARTING: "starting",
    pb.WORKER_STATE_READY: "ready",
    pb.WORKER_STATE_RESTARTING: "restarting",
    pb.WORKER_STATE_DRAINING: "draining",
}


class Worker:
    """What is at one address."""

    def __init__(
        self,
        lease: DecodeLease,
        on_change: Callable[[], None],
        usual: UsualOutput,
        tls: Tls | None = None,
    ) -> None:
        """``on_change`` is called when it may take requests that it didn't before, or the other way
        round. ``usual``: learns how long outputs are, from all workers."""
        self.lease = lease
        self.load = Load()
        self.prefixes = PrefixIndex()
        self.breaker = Breaker()
        self._usual = usual
        self._lost_requests = False
        """Whether requests were lost with the connection that has just broken."""
        self._on_change = on_change
        self._missing_since: float | None = None
        self._down_since = time.monotonic()
        self._beat: pb.Heartbeat | None = None
        """The last one of the present stream."""
        self._reported_gone = False
        self.connection = WorkerConnection(
            lease.address,
            tls=tls,
            on_heartbeat=self._on_heartbeat,
            on_change=self._on_connection,
            load=self.load,
            on_end=self._on_end,
        )

    @property
    def worker_id(self) -> str:
        """Of the process that answers; if none does, of the last one that had a lease."""
        return self._beat.worker_id if self._beat is not None else self.lease.worker_id

    @property
    def names(self) -> tuple[str, ...]:
        """Of its model, and of that with an adapter each."""
        return (self.lease.model, *self.lease.adapters)

    def serves(self, model: str) -> bool:
        return model == self.lease.model or model in self.lease.adapters

    @property
    def state(self) -> WorkerState:
        if self._beat is not None:
            return _STATES.get(self._beat.state, "starting")
        return self.lease.state

    @property
    def ready(self) -> bool:
        """Whether it serves, as far as is known: one that was never met does if its lease says
        so."""
        leased = self._missing_since is None and not self.connection.met
        return self.state == "ready" and (self.connection.up or leased)

    @property
    def gone(self) -> bool:
        return self._gone_for() >= 0

    @property
    def forgotten(self) -> bool:
        return self._gone_for() >= FORGET_S

    def observe(self, lease: DecodeLease) -> None:
        """Its lease was read."""
        news = lease.worker_id != self.lease.worker_id or self._missing_since is not None
        self.lease = lease
        self._missing_since = None
        self._reported_gone = False
        if self._beat is None:
            self.load.observe(lease.running + lease.waiting)
        if news and not self.connection.up:
            self.connection.hurry()

    def miss(self) -> None:
        """Redis answered, and has no lease of it."""
        self._missing_since = self._missing_since or time.monotonic()
        if self.gone and not self._reported_gone:
            self._reported_gone = True
            log.info("worker gone", worker_id=self.lease.worker_id, address=self.lease.address)

    @property
    def resumes(self) -> bool:
        """Whether a request may begin there with output that it has already."""
        return self._beat is not None and self._beat.resumes

    @property
    def build(self) -> str:
        """What the bits of its logits depend on, as far as it is told."""
        lease = self.lease
        tp = lease.tensor_parallel_size
        return f"{lease.weight_dtype} {lease.quantization} {lease.isa} {tp}"

    def candidate(self, tokenizer_digest: str, hashes: Hashes) -> Candidate | None:
        """For a prompt with these blocks. None where it takes no requests, or none whose prompts
        another tokenizer made."""
        if not self.connection.up or self.state not in ("ready", "restarting"):
            return None
        if not self.reads_as(tokenizer_digest):
            return None
        return Candidate(
            worker_id=self.worker_id,
            tier=self._tier,
            work=self.load.work(self._usual.tokens),
            prefix=self.prefixes.found(hashes),
            capacity=self.lease.max_batch_size,
            resumes=self.resumes,
            build=self.build,
            max_context_length=self.lease.max_context_length,
            last_chosen=self.load.last_chosen,
        )

    @property
    def _tier(self) -> int:
        """A restarting worker queues what it gets; one that keeps failing may do so again."""
        return 2 * self.spared + (self.state != "ready")

    @property
    def spared(self) -> bool:
        """Whether it gets only what no other worker can take."""
        return self.breaker.is_open(self.load.reserved)

    def reads_as(self, tokenizer_digest: str) -> bool:
        """Whether its token ids are those of this tokenizer, as far as both are known."""
        digests = {tokenizer_digest, self.lease.tokenizer_digest} - {""}
        return len(digests) < 2

    def send(self, sequence: int, start: pb.StartGeneration, place: Place) -> int:
        """Begin a request; returns its handle. Raises ``WorkerUnreachable`` or ``Overloaded``."""
        handle = self.connection.send(start, place)
        self.load.reserve(sequence, place.left)
        self.prefixes.add(place.prefix.hashes)
        return handle

    async def close(self, reason: PrecastError | None = None) -> None:
        await self.connection.close(reason)

    def _gone_for(self) -> float:
        """Seconds since it was given up; negative if it was not."""
        if self.connection.up or self._missing_since is None:
            return -1.0
        return time.monotonic() - max(self._missing_since, self._down_since) - MISSING_GRACE_S

    def _on_heartbeat(self, beat: pb.Heartbeat) -> None:
        before, self._beat = self._beat, beat
        changed = before is None or before.state != beat.state
        if before is None or beat.state == pb.WORKER_STATE_RESTARTING:
            self._lose_prefixes()  # with its ranks
        self.load.observe(beat.running + beat.waiting)
        if changed:
            self._on_change()

    def _lose_prefixes(self) -> None:
        self.prefixes.clear()
        blocks = self.lease.kv_blocks_total * _BLOCK_SIZE // BLOCK
        self.prefixes.most = min(MAX_BLOCKS, blocks or MAX_BLOCKS)

    def _on_end(self, place: Place, how: Ended) -> None:
        self.load.release(place.left)
        if how is Ended.FINISHED:
            self.breaker.succeeded()
            self.prefixes.add(place.prefix.followed_by(place.tokens).hashes)
            self._usual.observe(len(place.tokens))
        elif how is Ended.FAILED:
            self.breaker.failed()
        elif how is Ended.LOST:
            self._lost_requests = True

    def _on_connection(self) -> None:
        if self._lost_requests:
            self.breaker.failed()  # once, however many they were
            self._lost_requests = False
        self._beat = None
        self._down_since = time.monotonic()
        self._on_change()
