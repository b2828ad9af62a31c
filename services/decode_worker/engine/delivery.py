"""Requests that run, and what steps gave them: each is told of its tokens once, and ends once."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from typing import Final, NamedTuple

from precast.log import get_logger
from precast.ops.draw_status import DrawStatus
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.engine.plain_run import LEAST, MOST, MOST_S, PlainRun, RunSteps
from services.decode_worker.engine.pooled_parts import take_sums
from services.decode_worker.engine.prompt_scores import PromptScores, take_scores
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import FinishReason, Sequence
from services.decode_worker.engine.step import ScheduledStep, StepBatch
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.protocol import Logprobs, StepDone

log = get_logger(__name__)

_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class _Outcome(NamedTuple):
    """What one step gave one sequence."""

    request: Request
    token: int
    logprobs: Logprobs | None
    finished: FinishReason | None


class Delivery:
    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._requests: dict[str, Request] = {}
        self._unsent: list[_Outcome] = []
        """Outcomes of the last step that nobody was told of yet."""
        self._scores: list[tuple[Request, PromptScores]] = []
        """Of prompts, likewise; they come before outcomes."""
        self.settle: Callable[[], None] = lambda: None
        """Called before requests that steps are under way for change by what is no step."""

    def knows(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: Request) -> None:
        """A request that the scheduler has taken."""
        request.came_s = time.monotonic()
        self._requests[request.request_id] = request

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees its blocks; returns whether it was there."""
        self.settle()
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._scheduler.abort(request_id)
        request.finish(pb.FINISH_REASON_ABORTED, flush=False)
        return True

    def begun(self, step: ScheduledStep) -> None:
        """A step is sent, perhaps the first one of some requests."""
        for sequence in step.sequences:
            request = self._request_of(sequence)
            if request is not None and not request.started_s:
                request.started_s = time.monotonic()
                self._metrics.queue_seconds.observe(request.started_s - request.came_s)

    def plain_run(self, batch: StepBatch, like: RunSteps) -> PlainRun | None:
        """The short way for the next steps of a batch; None if there is none. Blocks of windows
        come and go with each step."""
        if self._unsent or self._scores or self._scheduler.windows is not None:
            return None
        first = self._request_of(batch.sequences[0])
        sink = first.outbox.sink_now() if first is not None else None
        if sink is None:  # over gRPC, or to a slow reader
            return None
        requests = [r for s in batch.sequences if (r := self._request_of(s)) and r.is_plain]
        alike = {(one.outbox, one.told_s) for one in requests}
        if len(requests) < len(batch.sequences) or len(alike) > 1:
            return None
        soon = max(LEAST, int(MOST_S / max(like.expected_s, 1e-4)))
        steps = min(MOST, soon, self._scheduler.steps_left(batch))
        drafting = self._scheduler.watched(batch) if steps >= LEAST else None
        if drafting is None:
            return None
        blocks, settle = self._scheduler.blocks, self._scheduler.settle
        return PlainRun(requests, sink, blocks, like, steps, drafting, settle, self._fail_text)

    def take_in(self, step: ScheduledStep, done: StepDone) -> None:
        """The oldest step is over; what it gave is told by the next ``tell``."""
        if step.scored:
            self._scores += self._scored(step, done)
        if step.pooled:
            self._take_pooled(step, done)
        self._unsent += self._outcomes(step, done)

    def tell(self) -> None:
        """Tells of the last step's outcomes; whatever raises, each is told once."""
        outcomes, self._unsent = self._unsent, []
        if self._scores:
            self._tell_scores()
        now = time.monotonic()
        for outcome in outcomes:
            self._time(outcome.request, now)
            try:
                self._tell(outcome.request, outcome)
            except Exception as error:
                self._fail_text(outcome.request, error)
        for outbox in {outcome.request.outbox for outcome in outcomes}:
            outbox.flush()

    def _tell_scores(self) -> None:
        scores, self._scores = self._scores, []
        for request, part in scores:
            try:
                request.score_prompt(part)
            except Exception as error:
                self._fail_text(request, error)

    def _time(self, request: Request, now: float) -> None:
        """Measures a token; those of one step behind its first don't count."""
        if request.told_s == now:
            return
        if request.told_s:
            self._metrics.inter_token_seconds.observe(now - request.told_s)
        else:
            request.first_s = now
            self._metrics.first_token_seconds.observe(now - request.came_s)
        request.told_s = now

    def _fail_text(self, request: Request, error: Exception) -> None:
        """A fault of one request's text is the others' no business."""
        log.error("request failed", request_id=request.request_id, exc_info=error)
        self.settle()
        self._end(request)
        request.fail(pb.ERROR_CODE_INTERNAL, f"internal error ({type(error).__name__})")

    def refuse_stuck(self, sequences: Many[Sequence]) -> None:
        """Ends those whose output can't go on in its grammar, which is too complex there."""
        for sequence in sequences:
            if sequence.matcher is None or not sequence.matcher.error:
                continue
            if (request := self._request_of(sequence)) is not None:
                self._end(request)
                message = f"constraint: can't go on: {sequence.matcher.error.splitlines()[0]}"
                request.fail(pb.ERROR_CODE_INVALID_ARGUMENT, message)

    def fail_all(self, message: str) -> None:
        self._fail(list(self._requests.values()), message)

    def fail_lost(self, message: str) -> None:
        """Those whose sequences the scheduler has given up."""
        self._fail([r for r in self._requests.values() if not r.sequence.alive], message)

    def _fail(self, requests: Many[Request], message: str) -> None:
        for request in requests:
            self._end(request)
            request.fail(pb.ERROR_CODE_UNAVAILABLE, message)

    def _request_of(self, sequence: Sequence) -> Request | None:
        """None if it was aborted while a step ran."""
        request = self._requests.get(sequence.request_id)
        return request if request is not None and request.sequence is sequence else None

    def _scored(
        self, step: ScheduledStep, done: StepDone
    ) -> Iterator[tuple[Request, PromptScores]]:
        for part in take_scores(step.scored, done.scores):
            if (request := self._request_of(part.sequence)) is None:
                continue
            if None in part.logprobs:
                self._fail_draw(request, DrawStatus.NOT_FINITE)
            else:
                yield request, part

    def _take_pooled(self, step: ScheduledStep, done: StepDone) -> None:
        """The vectors go out with the ends."""
        for sequence in take_sums(step.pooled, done.pooled):
            if (request := self._request_of(sequence)) is not None:
                self._fail_draw(request, DrawStatus.NOT_FINITE)

    def _outcomes(self, step: ScheduledStep, done: StepDone) -> Iterator[_Outcome]:
        for sequence, token, finished, place in self._scheduler.apply(step, done.token_ids):
            if (request := self._request_of(sequence)) is None:
                continue
            if token < 0:
                self._fail_draw(request, DrawStatus(done.failed[place]))
                continue
            if finished is not None:
                del self._requests[sequence.request_id]
                self._metrics.cached.inc(sequence.cached)
                self._metrics.prompts.inc(len(sequence.prompt))
            logprobs = done.logprobs[place] if done.logprobs else None
            yield _Outcome(request=request, token=token, logprobs=logprobs, finished=finished)

    def _fail_draw(self, request: Request, status: DrawStatus) -> None:
        """Ends a request whose token could not be drawn; the others of the step go on."""
        self._metrics.failed_draws.labels(status.name.lower()).inc()
        log.error(
            "no token drawn",
            request_id=request.trace_id or request.request_id,
            reason=status.message,
        )
        self._end(request)
        request.fail(pb.ERROR_CODE_INTERNAL, f"no token could be drawn: {status.message}")

    def _tell(self, request: Request, outcome: _Outcome) -> None:
        if request.ended:
            return
        stopped = request.push(outcome.token, outcome.logprobs)
        if stopped:
            self._end(request)
            request.finish(pb.FINISH_REASON_STOP, flush=False)
        elif outcome.finished is not None:
            request.finish(_REASONS[outcome.finished], flush=True)

    def _end(self, request: Request) -> None:
        self._scheduler.finish(request.request_id)
        self._requests.pop(request.request_id, None)
