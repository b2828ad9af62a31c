"""A decode worker as its gRPC service and its lease see it."""

import os
from collections.abc import Callable
from typing import Final

from tokenizers import Tokenizer

from precast.config.settings import DecodeWorkerSettings
from precast.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PrecastError,
    Unavailable,
)
from precast.fleet.leases import DecodeLease, WorkerState
from precast.models.config import ModelConfig
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.telemetry import Tracer
from precast.tokenizer.detokenizer import Detokenizer
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.constraints.compiler import ConstraintCompiler
from services.decode_worker.constraints.grammar import grammar_of
from services.decode_worker.draining import Draining
from services.decode_worker.engine.admission import make_sequence
from services.decode_worker.engine.engine import Engine
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.response_buffer import Ending, Outbox, Recipient
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.graphs.autotune.report import stats_report
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.pending import PendingRequests, constrain
from services.decode_worker.tracing import record_request

_STATES = {
    "starting": pb.WORKER_STATE_STARTING,
    "ready": pb.WORKER_STATE_READY,
    "restarting": pb.WORKER_STATE_RESTARTING,
    "draining": pb.WORKER_STATE_DRAINING,
}
_CODES: tuple[tuple[type[PrecastError], "pb.ErrorCode.ValueType"], ...] = (
    (ContextLengthExceeded, pb.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED),
    (ModelNotFound, pb.ERROR_CODE_MODEL_NOT_FOUND),
    (InvalidRequest, pb.ERROR_CODE_INVALID_ARGUMENT),
    (Overloaded, pb.ERROR_CODE_OVERLOADED),
    (Unavailable, pb.ERROR_CODE_UNAVAILABLE),
)
_NO_ADDRESS: Final = "unknown:1"
"""In a lease that is read for a status, and not published."""


def _code_of(error: PrecastError) -> "pb.ErrorCode.ValueType":
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    return code or pb.ERROR_CODE_INTERNAL


class Worker:
    def __init__(
        self,
        *,
        worker_id: str,
        settings: DecodeWorkerSettings,
        config: ModelConfig,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        engine: Engine,
        graphs: GraphManager,
        max_context_length: int,
        constraints: ConstraintCompiler,
        tokenizer_digest: str = "",
        tracer: Tracer | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_change`` is called when it admits requests no more, and when it does again."""
        self._worker_id = worker_id
        self._settings = settings
        self._config = config
        self._quantization = settings.precision(config.own_quantization).quantization
        self._tokens = TokenTable(tokenizer)
        self._scheduler = scheduler
        self._engine = engine
        self._graphs = graphs
        self._max_context_length = max_context_length
        self._tokenizer_digest = tokenizer_digest
        self._tracer = tracer
        self._eos = frozenset(config.eos_token_ids)
        self._draining = Draining(self.abort, on_change)
        self._constraints = constraints
        self._pending = PendingRequests(constraints, self._admit, _code_of)
        self.watchers: Final = set[Callable[[], None]]()
        """Told when the state changes."""
        self._had_graphs = False
        """Whether all graphs were there once: a size that is added later is no reason to pause."""

    def start(
        self,
        recipient: Recipient,
        start: pb.StartGeneration,
        outbox: Outbox,
        on_end: Callable[[str], None],
    ) -> Ending | None:
        """Queues a request; returns the refusal, if it was refused."""
        try:
            self._submit(recipient, start, outbox, on_end)
        except PrecastError as error:
            refusal = pb.GenerationError(code=_code_of(error), message=str(error))
            return Ending(recipient=recipient, end=refusal)
        return None

    def _submit(
        self,
        recipient: Recipient,
        start: pb.StartGeneration,
        outbox: Outbox,
        on_end: Callable[[str], None],
    ) -> None:
        self._draining.check()
        request_id = recipient.request_id
        if self._engine.knows(request_id) or self._pending.knows(request_id):
            raise InvalidRequest(f"request_id {request_id!r} is running already")
        request = self._request(recipient, start, outbox, on_end)
        if not start.HasField("constraint"):
            self._admit(request)
            return
        grammar = grammar_of(start.constraint)
        matcher = self._constraints.known(grammar)
        if matcher is not None:
            constrain(request, matcher)
            self._admit(request)
        else:
            self._draining.admitted(request_id)
            self._pending.begin(request, grammar)

    def _admit(self, request: Request) -> None:
        request.resume()
        matcher = request.sequence.matcher
        if matcher is not None and matcher.is_complete:  # all that was lost is its end
            request.finish(pb.FINISH_REASON_STOP, flush=True)
            return
        self._engine.submit(request)
        self._draining.admitted(request.request_id)

    def _request(
        self,
        recipient: Recipient,
        start: pb.StartGeneration,
        outbox: Outbox,
        on_end: Callable[[str], None],
    ) -> Request:
        """Raises InvalidRequest or ModelNotFound."""
        request_id = recipient.request_id
        sequence = make_sequence(
            request_id,
            start,
            models=self._settings.served_names,
            vocab_size=self._config.vocab_size,
            hidden_size=self._config.hidden_size,
            eos_token_ids=self._eos,
        )
        if start.HasField("prompt_logprobs") and not outbox.columns:
            raise InvalidRequest("prompt_logprobs: the stream has to ask for columns")
        stop = start.stop
        detokenizer = Detokenizer(
            self._tokens,
            sequence.prompt,
            stop.stop_strings,
            keep_stop_string=stop.include_stop_string,
            show_special_tokens=stop.show_special_tokens,
        )

        def ended(request_id: str) -> None:
            self._draining.ended(request_id)
            on_end(request_id)
            if self._tracer is not None and start.traceparent:
                record_request(self._tracer, request, self._worker_id)

        request = Request(
            sequence=sequence,
            recipient=recipient,
            detokenizer=detokenizer,
            tokens=self._tokens,
            outbox=outbox,
            on_end=ended,
            hidden_token_ids=sequence.stop_token_ids,
            show_special_tokens=stop.show_special_tokens,
            prompt_only=sequence.prompt_only,
            deliver_at_end=start.deliver_at_end,
            trace_id=start.trace_id,
            traceparent=start.traceparent,
        )
        return request

    def abort(self, request_id: str) -> bool:
        return self._pending.abort(request_id) or self._engine.abort(request_id)

    async def drain(self, deadline_s: float, *, stopping: bool = False) -> tuple[int, int]:
        """Requests that finished and that were aborted. Raises WrongState if the worker is taken
        back into service meanwhile. ``stopping``: it can't be."""
        return await self._draining.drain(deadline_s, stopping=stopping)

    def undrain(self) -> bool:
        """Takes requests again; whether it took none before. Raises WrongState."""
        return self._draining.undrain()

    @property
    def state(self) -> WorkerState:
        if self._draining.on:
            return "draining"
        if not self._engine.started.is_set():
            return "starting"
        if not self._engine.up:
            return "restarting"
        if self._settings.wait_for_graphs and not self._had_graphs and self._graphs.missing:
            return "starting"
        self._had_graphs = True
        return "ready"

    def tell_change(self) -> None:
        """The state is another one than before."""
        for tell in list(self.watchers):
            tell()

    def heartbeat(self) -> pb.Heartbeat:
        return pb.Heartbeat(
            worker_id=self._worker_id,
            state=_STATES[self.state],
            running=self._engine.running,
            waiting=self._engine.waiting,
            resumes=True,
        )

    def lease(self, address: str) -> DecodeLease:
        return DecodeLease(
            worker_id=self._worker_id,
            address=address,
            pid=os.getpid(),
            model=self._settings.model,
            adapters=self._settings.served_names[1:],
            state=self.state,
            running=self._engine.running,
            waiting=self._engine.waiting,
            max_batch_size=self._settings.max_batch_size,
            max_context_length=self._max_context_length,
            kv_blocks_total=self._scheduler.blocks.total,
            kv_blocks_free=self._scheduler.blocks.free_blocks,
            tensor_parallel_size=self._settings.tp,
            isa=self._graphs.isa,
            weight_dtype=self._settings.weight_dtype,
            quantization=self._quantization,
            tokenizer_digest=self._tokenizer_digest,
            graphs=self._graphs.records(),
            captures_wanted=self._graphs.missing,
        )

    def graph_specs(self, num_tokens: int) -> pb.GetGraphSpecsResponse:
        """The distinct graphs of a size; of all sizes whose graph is missing for 0."""
        sizes = (num_tokens,) if num_tokens else self._graphs.missing
        unknown = [size for size in sizes if size not in self._graphs.sizes]
        if unknown:
            captured = ", ".join(map(str, self._graphs.sizes))
            raise InvalidRequest(f"num_tokens = {unknown[0]}: this worker has graphs of {captured}")
        specs = [
            pb.WantedGraph(num_tokens=wanted.num_tokens, factors=spec)
            for wanted in self._graphs.wanted
            for number, spec in enumerate(wanted.specs)
            if wanted.num_tokens in sizes and spec not in wanted.specs[:number]
        ]
        return pb.GetGraphSpecsResponse(wanted=specs)

    def status(self) -> pb.GetStatusResponse:
        lease = self.lease(_NO_ADDRESS)
        return pb.GetStatusResponse(
            worker_id=lease.worker_id,
            model=lease.model,
            state=_STATES[lease.state],
            tensor_parallel_size=lease.tensor_parallel_size,
            max_batch_size=lease.max_batch_size,
            max_context_length=lease.max_context_length,
            running=lease.running,
            waiting=lease.waiting,
            kv_blocks_total=lease.kv_blocks_total,
            kv_blocks_free=lease.kv_blocks_free,
            graphs=[
                pb.LoadedGraph(
                    num_tokens=graph.num_tokens, keys=graph.keys, versions=graph.versions
                )
                for graph in lease.graphs
            ],
            weight_dtype=lease.weight_dtype,
            quantization=lease.quantization,
            graph_steps=self._engine.counts.graph_steps,
            eager_steps=self._engine.counts.eager_steps,
            graph_prompt_steps=self._engine.counts.graph_prompt_steps,
            eager_prompt_steps=self._engine.counts.eager_prompt_steps,
            traffic=stats_report(
                self._engine.counts.stats,
                self._graphs,
                self._settings.graph_sizes,
                adapts=self._settings.adapt_graphs,
            ),
            restarts=self._engine.restarts,
        )
