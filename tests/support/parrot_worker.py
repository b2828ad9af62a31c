"""A decode worker without a model: it says the prompt's own tokens again and again.

A prompt may say what it is to say instead: ``!say text !end``; or ``ASK``, for what the worker was
asked for, as JSON.

A real gRPC server with a real lease, for tests and benchmarks of what stands in front of it. Run
``python -m tests.support.parrot_worker --help``. Prompts that begin with one of ``FAULTS``
fail in that way.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import uuid
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from tokenizers import Tokenizer

from precast.fleet.heartbeat import Heartbeat
from precast.fleet.leases import LEASE_TTL_S, DecodeLease, Registry
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1 import decode_service_pb2_grpc as pb_grpc
from precast.rpc.local_link import serving_locally
from precast.rpc.server import Service, start_server, wants_columns, wants_heartbeats
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.engine.response_buffer import Ending, Outbox, Output, Recipient, Sink

FAULTS: Final = {
    "!invalid": pb.ERROR_CODE_INVALID_ARGUMENT,
    "!context": pb.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED,
    "!overloaded": pb.ERROR_CODE_OVERLOADED,
    "!internal": pb.ERROR_CODE_INTERNAL,
}
"""The error quotes the prompt, and what logs call the request."""
REFUSED: Final = "uniqueItems"
"""A keyword of schemas that it can't hold an answer to."""
FAIL_AFTER_TWO: Final = "!later"
"""Two tokens, then INTERNAL."""
SLOW: Final = "!slow"
"""A tenth of a second a token, or what ``--slow-ms`` says."""
_BEAT_S: Final = 0.23
"""Of the lease. No part of half a second, or gateways might never see one that lapses at once."""
SILENT: Final = "!silent"
"""Never a token."""
_SAY: Final = re.compile("!say (.*?) !end", re.DOTALL)
ASK: Final = "!ask"
EMBEDDING: Final = 8
"""Values of a prompt's vector."""


@dataclass(kw_only=True)
class Speech:
    """One generation: text lags the tokens as the protocol says."""

    table: TokenTable
    start: pb.StartGeneration
    max_context_length: int
    words: list[int] = field(default_factory=list)
    """What is said once; empty: the prompt, over and over."""
    ids: list[int] = field(default_factory=list)
    sent: int = 0
    """Characters that were sent."""
    finished: int = 0
    """The reason, once it has one."""
    stop_string: str = ""
    _heard: list[int] = field(init=False)
    """Of the prompt, what may be said."""

    def __post_init__(self) -> None:
        """What is resumed was said already."""
        sampling = self.start.sampling
        allowed = sampling.allowed_token_ids or range(2**32)
        self._heard = [
            token
            for token in self.start.prompt_token_ids
            if token in allowed and token not in sampling.banned_token_ids
        ]
        for token in self.start.resumed_token_ids:
            self.ids.append(token)
            self.sent = max(self.sent, len(self._sendable(self._text())))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.table.tokenizer

    def _next(self, words: list[int]) -> int:
        """The word whose turn it is, or the next one that completes nothing forbidden."""
        banned = [list(one.token_ids) for one in self.start.sampling.banned_sequences]
        at = len(self.ids) % len(words)
        for token in (*words[at:], *words[:at]):
            said = [*self.ids, token]
            if not any(said[-len(ids) :] == ids for ids in banned):
                return token
        raise AssertionError("nothing is left to say")

    def step(self) -> tuple[int, str, pb.TokenLogprob | None]:
        """A token, the text that it completes, and its report."""
        prompt = self.start.prompt_token_ids
        words = self.words or self._heard
        self.ids.append(self._next(words))
        if len(self.ids) == len(self.words):
            self.finished = pb.FINISH_REASON_STOP
        full = len(prompt) + len(self.ids) >= self.max_context_length
        if full or len(self.ids) == self.start.stop.max_tokens:
            self.finished = pb.FINISH_REASON_LENGTH
        text = self._sendable(self._text())
        new = text[self.sent :]
        self.sent = max(self.sent, len(text))
        asked = self.start.HasField("logprobs")
        report = self._logprob(self.ids[-1], self.start.logprobs) if asked else None
        return self.ids[-1], new, report

    def _text(self) -> str:
        hidden = not self.start.stop.show_special_tokens
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=hidden))

    def _sendable(self, text: str) -> str:
        stops = list(self.start.stop.stop_strings)
        cuts = [(text.index(stop), stop) for stop in stops if stop in text]
        if cuts:
            self.finished = pb.FINISH_REASON_STOP
            at, self.stop_string = min(cuts)
            return text[:at]
        if self.finished:
            return text
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        return text[: len(text) - _held_back(text, stops)]

    def prompt_logprobs(self) -> list[pb.TokenLogprob]:
        """The n-th token's is -n / 4."""
        reports = []
        for at, token in enumerate(self.start.prompt_token_ids):
            report = self._logprob(token, self.start.prompt_logprobs if at else 0)
            report.logprob = -at / 4
            reports.append(report)
        return reports

    def _logprob(self, token: int, count: int) -> pb.TokenLogprob:
        text, token_bytes = self.table.shown(token)
        report = pb.TokenLogprob(token_id=token, logprob=-0.5, text=text, token_bytes=token_bytes)
        for rank in range(count):
            other = (token + 1 + rank) % self.tokenizer.get_vocab_size()
            text, token_bytes = self.table.shown(other)
            logprob = -1.0 - rank
            report.top.add(token_id=other, logprob=logprob, text=text, token_bytes=token_bytes)
        return report


class Parrot(pb_grpc.DecodeServiceServicer):
    """The servicer. ``running`` holds the ids of requests that take a slot."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._tokenizer = Tokenizer.from_file(
            str(options.models_dir / options.model / "tokenizer.json")
        )
        self._table = TokenTable(self._tokenizer)
        self.worker_id = options.worker_id or f"parrot-{uuid.uuid4().hex[:8]}"
        self.running: dict[str, asyncio.Task[None]] = {}
        self.served = 0
        self.said = 0
        """Tokens, of all requests."""
        self._slow_s = options.slow_ms / 1000
        self._step_s = options.step_ms / 1000
        self._seen: set[tuple[str, tuple[int, ...]]] = set()
        self.state = options.state
        self.changed = asyncio.Event()
        """The state has changed."""
        self._outs: dict[str, tuple[asyncio.Task[None], Recipient, Outbox]] = {}
        self._told: set[Outbox] = set()
        """Those with tokens of this turn of the loop, which go out at its end, as of a step."""

    async def Generate(self, requests: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        columns = self._options.columns and wants_columns(context)
        responses = self._generate_on(requests, Outbox(columns=columns), wants_heartbeats(context))
        async with aclosing(responses):
            async for response in responses:
                yield response

    async def local(self, requests: Any, link: Sink) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Generate, for gateways of the same host."""
        out = Outbox(columns=self._options.columns)
        if out.columns:
            out.attach(link)
        async with aclosing(self._generate_on(requests, out, True)) as responses:
            async for response in responses:
                yield response

    async def _generate_on(
        self, requests: Any, out: Outbox, heartbeats: bool
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        mine: set[str] = set()
        reader = asyncio.create_task(self._read(requests, out, mine))
        beats = self._options.heartbeats and heartbeats
        heart = asyncio.create_task(self._beat(out, wanted=beats))
        try:
            async for response in out.responses():
                yield response
        finally:
            reader.cancel()
            heart.cancel()
            for request_id in mine:
                self._stop(request_id)

    async def _read(self, requests: Any, out: Outbox, mine: set[str]) -> None:
        async for request in requests:
            recipient = Recipient(request_id=request.request_id, handle=request.handle)
            if request.WhichOneof("action") == "abort":
                self._stop(request.request_id)
            elif len(self.running) >= self._options.max_running:
                out.end(_error(recipient, pb.ERROR_CODE_OVERLOADED, "full"))
            else:
                mine.add(request.request_id)
                work = self._generate(recipient, request.start, out)
                task = self.running[request.request_id] = asyncio.create_task(work)
                self._outs[request.request_id] = (task, recipient, out)
        out.close()

    async def _beat(self, out: Outbox, *, wanted: bool) -> None:
        while wanted:
            self.changed.clear()
            beat = pb.Heartbeat(
                worker_id=self.worker_id,
                state=pb.WorkerState.Value(f"WORKER_STATE_{self.state.upper()}"),
                running=len(self.running),
                resumes=bool(self._options.columns),
            )
            out.heartbeat(beat)
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.changed.wait()

    def lose_ranks(self) -> None:
        """What a worker does whose ranks have died: all that runs ends, and may be sent again."""
        self.state = "restarting"
        for task, recipient, out in list(self._outs.values()):
            task.cancel()
            out.end(_error(recipient, pb.ERROR_CODE_UNAVAILABLE, "the ranks have died"))
        self.changed.set()

    def recover(self) -> None:
        """And no longer take time for a token: nobody needs to catch it at one from here on."""
        self._slow_s = self._step_s = 0.0
        self.state = "ready"
        self.changed.set()

    def _stop(self, request_id: str) -> None:
        task = self.running.pop(request_id, None)
        if task is not None:
            task.cancel()

    async def _generate(self, recipient: Recipient, start: pb.StartGeneration, out: Outbox) -> None:
        try:
            self.served += 1
            await self._speak(recipient, start, out)
        finally:
            self.running.pop(recipient.request_id, None)
            self._outs.pop(recipient.request_id, None)

    async def _speak(self, recipient: Recipient, start: pb.StartGeneration, out: Outbox) -> None:
        while self.state == "restarting":  # it queues what it gets
            await asyncio.sleep(0.02)
        said = self._tokenizer.decode(list(start.prompt_token_ids[:16]))
        fault = next((FAULTS[prefix] for prefix in FAULTS if said.startswith(prefix)), None)
        if fault is not None:
            out.end(_error(recipient, fault, f"told to fail: {said} [{start.trace_id}]"))
            return
        if said.startswith(SILENT):
            await asyncio.Event().wait()
        if start.embed.dimensions > EMBEDDING:
            refusal = f"dimensions: the model's embeddings have {EMBEDDING}"
            out.end(_error(recipient, pb.ERROR_CODE_INVALID_ARGUMENT, refusal))
            return
        if REFUSED in str(start.constraint):
            refusal = f"constraint: json_schema: not supported: {REFUSED}"
            out.end(_error(recipient, pb.ERROR_CODE_INVALID_ARGUMENT, refusal))
            return
        speech = self._speech(start)
        if start.HasField("prompt_logprobs") and out.columns:
            out.prompt(recipient, speech.prompt_logprobs())
        if await self._say(recipient, speech, out, said):
            self._finish(recipient, speech, out)

    def _speech(self, start: pb.StartGeneration) -> Speech:
        speech = Speech(
            table=self._table,
            start=start,
            max_context_length=self._options.max_context_length,
            words=self._words(self._tokenizer.decode(list(start.prompt_token_ids)), start),
        )
        if not start.stop.max_tokens:
            speech.finished = pb.FINISH_REASON_LENGTH
        return speech

    async def _say(self, recipient: Recipient, speech: Speech, out: Outbox, said: str) -> bool:
        """Whether it came to its end."""
        step_s = self._slow_s if said.startswith(SLOW) else self._step_s
        kept = Output(recipient=recipient)
        while not speech.finished:
            await asyncio.sleep(step_s)
            self.said += 1
            if len(speech.ids) == 2 and said.startswith(FAIL_AFTER_TWO):
                out.end(_error(recipient, pb.ERROR_CODE_INTERNAL, "told to fail"))
                return False
            if speech.start.deliver_at_end:
                kept.add(*speech.step())
            else:
                out.token(recipient, *speech.step())
                self._tell(out)
        if kept.token_ids:
            out.whole(kept)
        return True

    def _tell(self, out: Outbox) -> None:
        if not self._told:
            asyncio.get_running_loop().call_soon(self._tell_all)
        self._told.add(out)

    def _tell_all(self) -> None:
        told, self._told = self._told, set()
        for out in told:
            out.flush()

    def _finish(self, recipient: Recipient, speech: Speech, out: Outbox) -> None:
        finished = pb.GenerationFinished(
            reason=speech.finished,
            prompt_tokens=len(speech.start.prompt_token_ids),
            completion_tokens=len(speech.ids),
            cached_tokens=self._cached(speech.start),
            embedding=_vector(speech.start),
            stop_string=speech.stop_string,
        )
        out.end(Ending(recipient=recipient, end=finished))

    def _words(self, said: str, start: pb.StartGeneration) -> list[int]:
        found = _SAY.findall(said)
        if not found and ASK not in said:
            return []
        text = found[-1] if found else _asked(start)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _cached(self, start: pb.StartGeneration) -> int:
        """All tokens but the last of a prompt that was here before, with the same salt."""
        seen = (start.cache_salt, tuple(start.prompt_token_ids))
        cached = len(start.prompt_token_ids) - 1 if seen in self._seen else 0
        self._seen.add(seen)
        return cached

    async def GetStatus(self, _request: Any, _context: Any) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(
            worker_id=self.worker_id,
            running=len(self.running),
            graph_steps=self.served,
            eager_steps=self.said,
        )

    def lease(self, port: int) -> DecodeLease:
        return DecodeLease(
            worker_id=self.worker_id,
            address=f"127.0.0.1:{port}",
            model=self._options.model,
            state=self.state,
            running=len(self.running),
            max_batch_size=8,
            max_context_length=self._options.max_context_length,
            weight_dtype="fp32",
            quantization="none",
            tokenizer_digest=self._options.tokenizer_digest,
        )


def _asked(start: pb.StartGeneration) -> str:
    """The request without its prompt, as JSON."""
    copy = pb.StartGeneration()
    copy.CopyFrom(start)
    del copy.prompt_token_ids[:]
    return json.dumps(MessageToDict(copy, preserving_proto_field_name=True))


def _vector(start: pb.StartGeneration) -> bytes:
    """The first token's id, how many there are, their sum, how they are pooled, and noughts."""
    if not start.HasField("embed"):
        return b""
    ids = start.prompt_token_ids
    values = [ids[0], len(ids), sum(ids), start.embed.pooling, *[0] * (EMBEDDING - 4)]
    return array("f", values[: start.embed.dimensions or EMBEDDING]).tobytes()


def _held_back(text: str, stops: Any) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def _error(recipient: Recipient, code: Any, message: str) -> Ending:
    return Ending(recipient=recipient, end=pb.GenerationError(code=code, message=message))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--models-dir", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--worker-id", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of one token")
    parser.add_argument("--slow-ms", type=float, default=100.0, help=f"the same after {SLOW}")
    parser.add_argument("--max-running", type=int, default=1000)
    parser.add_argument("--max-context-length", type=int, default=256)
    parser.add_argument("--state", default="ready")
    parser.add_argument("--heartbeats", type=int, default=1, help="0: as older workers, none")
    parser.add_argument("--local", type=int, default=1, help="0: as on another host, gRPC alone")
    parser.add_argument("--columns", type=int, default=1, help="0: as older workers, none")
    parser.add_argument("--tokenizer-digest", default="")
    parser.add_argument("--lease-ttl-s", type=float, default=LEASE_TTL_S)
    return parser.parse_args(arguments)


async def _serve(options: argparse.Namespace) -> None:
    parrot = Parrot(options)
    service = Service(
        descriptor=pb.DESCRIPTOR.services_by_name["DecodeService"],
        servicer=parrot,
        add_to_server=pb_grpc.add_DecodeServiceServicer_to_server,
    )
    server = await start_server(f"127.0.0.1:{options.port}", [service])
    registry = Registry.connect(options.redis_url, lease_ttl_s=options.lease_ttl_s)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, parrot.lose_ranks)
    loop.add_signal_handler(signal.SIGUSR2, parrot.recover)
    name = parrot.worker_id if options.local else f"{parrot.worker_id}-hidden"
    async with (
        serving_locally(name, parrot.local, pb.GenerateRequest.FromString),
        Heartbeat(registry, lambda: parrot.lease(server.port), interval_s=_BEAT_S),
    ):
        print(server.port, flush=True)
        os.dup2(2, 1)  # whoever reads the port reads nothing more
        await server.wait_for_termination()


def main(arguments: Sequence[str]) -> None:
    asyncio.run(_serve(_options(arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
