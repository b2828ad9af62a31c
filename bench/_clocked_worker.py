"""A decode worker without a model whose streams get a token at each stroke of a clock.

Streams are dealt to groups, as to workers with a batch each: a group's step is one message. A
token's text is the time at which it was made, so that whoever reads it knows how long it was on its
way. ``python -m bench._clocked_worker --help``; it prints its port.
"""

import argparse
import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from precast.fleet.heartbeat import Heartbeat
from precast.fleet.leases import DecodeLease, Registry
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1 import decode_service_pb2_grpc as pb_grpc
from precast.rpc.local_link import LocalLink, serving_locally
from precast.rpc.server import Service, start_server
from services.decode_worker.engine.response_buffer import Ending, Outbox, Recipient

MODEL: Final = "tiny"
_TOKEN: Final = 7
_BEAT_S: Final = 1.0


@dataclass(kw_only=True)
class _Speech:
    recipient: Recipient
    outbox: Outbox
    left: int
    total: int


class ClockedWorker(pb_grpc.DecodeServiceServicer):
    """The servicer."""

    def __init__(self, groups: int, step_s: float) -> None:
        self.worker_id = f"clocked-{uuid.uuid4().hex[:8]}"
        self._groups: list[dict[str, _Speech]] = [{} for _ in range(groups)]
        self._step_s = step_s
        self._came = itertools.count()

    async def Generate(  # noqa: N802  # gRPC names methods in its own way
        self, requests: Any, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        async with aclosing(self._answer(requests, None)) as responses:
            async for response in responses:
                yield response

    def local(self, requests: Any, link: LocalLink) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Generate, for gateways of the same host."""
        return self._answer(requests, link)

    async def GetStatus(  # noqa: N802
        self, _request: Any, _context: Any
    ) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(worker_id=self.worker_id)

    async def run(self) -> None:
        """Strikes, each group in its turn."""
        begun, count = time.monotonic(), len(self._groups)
        for stroke in itertools.count(1):
            due = begun + stroke * self._step_s / count
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._step(self._groups[stroke % count])

    def lease(self, port: int) -> DecodeLease:
        return DecodeLease(
            worker_id=self.worker_id,
            address=f"127.0.0.1:{port}",
            model=MODEL,
            state="ready",
            max_batch_size=1024,
            max_context_length=4096,
            weight_dtype="fp32",
            quantization="none",
        )

    async def _answer(
        self, requests: Any, link: LocalLink | None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        outbox = Outbox(columns=True)
        if link is not None:
            outbox.attach(link)
        loops = [
            asyncio.create_task(one) for one in (self._read(requests, outbox), _beat(self, outbox))
        ]
        try:
            async for response in outbox.responses():
                yield response
        finally:
            for loop in loops:
                loop.cancel()

    async def _read(self, requests: Any, outbox: Outbox) -> None:
        async for request in requests:
            group = self._groups[next(self._came) % len(self._groups)]
            if request.WhichOneof("action") != "start":
                continue  # nobody leaves
            tokens = request.start.stop.max_tokens
            recipient = Recipient(request_id=request.request_id, handle=request.handle)
            group[request.request_id] = _Speech(
                recipient=recipient, outbox=outbox, left=tokens, total=tokens
            )

    def _step(self, group: dict[str, _Speech]) -> None:
        outboxes = set()
        now = f"{time.monotonic():.6f} "
        for request_id, speech in list(group.items()):
            speech.outbox.token(speech.recipient, _TOKEN, now, None)
            outboxes.add(speech.outbox)
            speech.left -= 1
            if not speech.left:
                del group[request_id]
                end = pb.GenerationFinished(
                    reason=pb.FINISH_REASON_LENGTH, completion_tokens=speech.total
                )
                speech.outbox.end(Ending(recipient=speech.recipient, end=end))
        for outbox in outboxes:
            outbox.flush()


async def _beat(worker: ClockedWorker, outbox: Outbox) -> None:
    while True:
        outbox.heartbeat(
            pb.Heartbeat(worker_id=worker.worker_id, state=pb.WORKER_STATE_READY, resumes=True)
        )
        await asyncio.sleep(_BEAT_S)


async def _serve(options: argparse.Namespace) -> None:
    worker = ClockedWorker(options.groups, options.step_ms / 1000)  # type: ignore[abstract]  # as far as it is asked
    service = Service(
        descriptor=pb.DESCRIPTOR.services_by_name["DecodeService"],
        servicer=worker,
        add_to_server=pb_grpc.add_DecodeServiceServicer_to_server,
    )
    server = await start_server("127.0.0.1:0", [service])
    registry = Registry.connect(options.redis_url)
    async with (
        serving_locally(worker.worker_id, worker.local, pb.GenerateRequest.FromString),
        Heartbeat(registry, lambda: worker.lease(server.port)),
    ):
        print(server.port, flush=True)
        await worker.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=80.0)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
