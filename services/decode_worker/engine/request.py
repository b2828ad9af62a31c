"""One running request in the leader: its sequence, its text so far, and where its output goes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from precast.errors import InvalidRequest
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.tokenizer.detokenizer import Detokenizer
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.engine.prompt_scores import PromptScores
from services.decode_worker.engine.response_buffer import Ending, Outbox, Output, Recipient
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.ranks.protocol import Logprobs


@dataclass(kw_only=True)
class Request:
    sequence: Sequence
    recipient: Recipient
    detokenizer: Detokenizer
    tokens: TokenTable
    outbox: Outbox
    on_end: Callable[[str], None]
    """Called once with the request's id when it has ended."""
    hidden_token_ids: frozenset[int]
    """End-of-sequence and stop tokens: counted and reported, but not part of the text."""
    show_special_tokens: bool = False
    prompt_only: bool = False
    """Only the prompt's log-probabilities or its embedding are wanted: what is drawn is dropped."""
    deliver_at_end: bool = False
    trace_id: str = ""
    """What logs call it, beside its own id."""
    traceparent: str = ""
    """The span that its own are within; empty: it is not traced."""
    came_s: float = 0.0
    """When it came, and below when it got its first token, and its last so far; monotonic, 0: not
    yet."""
    started_s: float = 0.0
    """When it was in a step first."""
    first_s: float = 0.0
    told_s: float = 0.0
    completion_tokens: int = 0
    end: pb.GenerationFinished | pb.GenerationError | None = field(default=None, init=False)
    """How it has ended."""
    _scored: bool = field(default=False, init=False)
    """Whether the prompt's log-probabilities have begun to be sent."""
    _kept: Output = field(init=False)
    """What waits for the end where all is to be delivered then."""

    def __post_init__(self) -> None:
        self._kept = Output(recipient=self.recipient)

    @property
    def ended(self) -> bool:
        return self.end is not None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is wanted of its next tokens but the text of each, as it comes."""
        held_back = self.deliver_at_end or self.prompt_only or not self.told_s or self.ended
        scored = self.sequence.sampling.logprobs >= 0 or self.sequence.prompt_logprobs >= 0
        return not held_back and not scored and self.detokenizer.is_plain

    @property
    def request_id(self) -> str:
        return self.sequence.request_id

    def resume(self) -> None:
        """Takes in the output that the sequence begins with: its text was sent already. Raises
        InvalidRequest if a stop string is in it."""
        for token in self.sequence.output:
            if self._take(token)[1]:
                raise InvalidRequest("resumed_token_ids has a stop string in its text")

    def push(self, token: int, logprobs: Logprobs | None) -> bool:
        """Sends what a new token adds; returns whether a stop string has ended the request."""
        if self.sequence.prompt_logprobs >= 0:
            self._begin_scores()
        if self.prompt_only:
            return False
        text, stopped = self._take(token)
        report = None if logprobs is None else self._logprob(token, logprobs)
        if self.deliver_at_end:
            self._kept.add(token, text, report)
        else:
            self.outbox.token(self.recipient, token, text, report)
        return stopped

    def score_prompt(self, scores: PromptScores) -> None:
        """Sends log-probabilities of the prompt's next tokens."""
        if self.ended:
            return
        self._begin_scores()
        reports = (
            self._scored_token(token, logprobs)
            for token, logprobs in zip(scores.tokens, scores.logprobs, strict=True)
            if logprobs is not None
        )
        self.outbox.prompt(self.recipient, list(reports))

    def _begin_scores(self) -> None:
        """The prompt's first token follows nothing."""
        if self._scored or self.sequence.prompt_logprobs < 0:
            return
        self._scored = True
        nothing = Logprobs(logprob=0.0, top_ids=(), top_logprobs=())
        self.outbox.prompt(self.recipient, [self._scored_token(self.sequence.prompt[0], nothing)])

    def finish(self, reason: "pb.FinishReason.ValueType", *, flush: bool) -> None:
        """Ends the request; ``flush`` sends text that was held back for a possible stop string."""
        if self.ended:
            return
        if self.prompt_only and reason == pb.FINISH_REASON_STOP:
            reason = pb.FINISH_REASON_LENGTH
        self._send_kept()
        if flush and (rest := self.detokenizer.flush()):
            self.outbox.text(self.recipient, rest)
        pooling = self.sequence.pooling if reason != pb.FINISH_REASON_ABORTED else None
        finished = pb.GenerationFinished(
            reason=reason,
            prompt_tokens=len(self.sequence.prompt),
            completion_tokens=self.completion_tokens,
            cached_tokens=min(self.sequence.cached, len(self.sequence.prompt)),
            embedding=pooling.vector() if pooling is not None else b"",
            stop_string=self.detokenizer.stop_string if reason == pb.FINISH_REASON_STOP else "",
        )
        self._end(finished)

    def fail(self, code: "pb.ErrorCode.ValueType", message: str) -> None:
        """Ends the request with an error, behind what it has got: it may go on elsewhere."""
        if not self.ended:
            self._send_kept()
            self._end(pb.GenerationError(code=code, message=message))

    def _take(self, token: int) -> tuple[str, bool]:
        """Text that a token completes, and whether a stop string is in it."""
        self.completion_tokens += 1
        if token in self.hidden_token_ids:
            return "", False
        early = self.completion_tokens <= self.sequence.sampling.min_tokens
        return self.detokenizer.push_token(token, may_stop=not early)

    def _send_kept(self) -> None:
        if self._kept.token_ids:
            self.outbox.whole(self._kept)

    def _end(self, end: pb.GenerationFinished | pb.GenerationError) -> None:
        self.end = end
        self.outbox.end(Ending(recipient=self.recipient, end=end))
        self.on_end(self.request_id)

    def _logprob(self, token: int, logprobs: Logprobs) -> pb.TokenLogprob:
        report = self._scored_token(token, logprobs)
        if token in self.hidden_token_ids:
            report.ClearField("token_bytes")
        return report

    def _scored_token(self, token: int, logprobs: Logprobs) -> pb.TokenLogprob:
        text, token_bytes = self.tokens.shown(token, special=self.show_special_tokens)
        report = pb.TokenLogprob(
            token_id=token, logprob=logprobs.logprob, text=text, token_bytes=token_bytes
        )
        for other, score in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True):
            text, token_bytes = self.tokens.shown(other, special=self.show_special_tokens)
            report.top.add(token_id=other, logprob=score, text=text, token_bytes=token_bytes)
        return report
