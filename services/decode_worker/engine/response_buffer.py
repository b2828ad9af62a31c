"""What a Generate stream still has to send.

What steps give to requests waits here until the stream takes it, all at once: a message for each
step, or fewer where the client reads slowly, whose steps are merged. A stream whose ended requests
are not read takes no new ones, so a slow reader costs a bounded amount of memory.

A stream gets columns (``StepOutput``) or, if it didn't ask for them, messages of single requests.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.step_tokens import StepTokens

MAX_UNREAD_ENDINGS: Final = 1024
MAX_PROMPT_TOKENS: Final = 1024
"""Of log-probabilities in one message: with 20 alternatives each, one megabyte."""
MAX_COLUMN_BYTES: Final = 8 << 20
"""Of one message, about; a stream that reads slowly may be behind by more."""
_FEW_TOKENS: Final = 256
"""Never too much for one message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipient:
    """A request as its stream knows it."""

    request_id: str
    handle: int
    """In columns; 0 in a stream without them."""


@dataclass(kw_only=True, slots=True)
class Output:
    """Tokens and text of one request that were not sent yet."""

    recipient: Recipient
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """What each of them completes, then what was held back up to the end."""
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    """None, or one for each token."""

    def add(self, token: int, text: str, logprob: pb.TokenLogprob | None) -> None:
        self.token_ids.append(token)
        self.texts.append(text)
        if logprob is not None:
            self.logprobs.append(logprob)

    def extend(self, later: "Output") -> None:
        self.token_ids += later.token_ids
        self.texts += later.texts
        self.logprobs += later.logprobs

    @property
    def size(self) -> int:
        """Bytes in a message, about."""
        reports = sum(report.ByteSize() for report in self.logprobs)
        return 4 * (len(self.token_ids) + sum(map(len, self.texts))) + reports


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a request has ended."""

    recipient: Recipient
    end: pb.GenerationFinished | pb.GenerationError


class Sink(Protocol):
    """Where a stream's messages go that can be sent at once."""

    @property
    def is_writable(self) -> bool:
        """Whether it takes a message now."""

    @property
    def kinds(self) -> bool:
        """Whether it takes ``StepTokens`` too."""

    def send(self, message: pb.GenerateResponse) -> None: ...

    def send_tokens(self, tokens: StepTokens) -> None: ...


class Outbox:
    def __init__(self, *, columns: bool = False) -> None:
        self.columns: Final = columns
        self._prompts: list[pb.PromptLogprobs] = []
        """Of prompts, in pieces."""
        self._outputs: dict[str, Output] = {}
        self._endings: list[Ending] = []
        self._heartbeat: pb.Heartbeat | None = None
        self._changed = asyncio.Event()
        self._read = asyncio.Event()
        """Set each time the client has taken what was waiting."""
        self._closed = False
        self._sink: Sink | None = None
        self._yielding = False
        """Whether ``responses`` is giving out what it has taken."""

    def attach(self, sink: Sink) -> None:
        """``flush`` may send to it, past ``responses``."""
        self._sink = sink

    def flush(self) -> None:
        """Send what waits now, where that can be; else ``responses`` has it."""
        if self._sink is None or self._yielding or not self._sink.is_writable:
            self._changed.set()
            return
        tokens = self._tokens_alone() if self._sink.kinds else None
        if tokens is not None:
            self._outputs = {}
            self._sink.send_tokens(tokens)
        else:
            for response in self._taken():
                self._sink.send(response)
        self._read.set()

    def sink_now(self) -> Sink | None:
        """Where tokens may be sent now, past what waits; None while other tokens do."""
        sink = self._sink
        if sink is None or self._outputs or self._yielding:
            return None
        return sink if sink.kinds and sink.is_writable else None

    def _tokens_alone(self) -> StepTokens | None:
        """What waits, if it is a few tokens and their text and nothing else."""
        if not self._outputs or self._endings or self._prompts or self._heartbeat is not None:
            return None
        handles: list[int] = []
        counts: list[int] = []
        token_ids: list[int] = []
        texts: list[str] = []
        for output in self._outputs.values():
            if output.logprobs or len(token_ids) > _FEW_TOKENS:
                return None
            handles.append(output.recipient.handle)
            counts.append(len(output.token_ids))
            token_ids += output.token_ids
            texts.append("".join(output.texts))
        return StepTokens(handles, counts, token_ids, texts)

    def token(
        self, recipient: Recipient, token: int, text: str, logprob: pb.TokenLogprob | None
    ) -> None:
        """Adds a token, and the text that it completes, to what waits for this request."""
        self._waiting(recipient).add(token, text, logprob)

    def prompt(self, recipient: Recipient, reports: list[pb.TokenLogprob]) -> None:
        """Adds log-probabilities of a prompt's next tokens; only where there are columns."""
        for first in range(0, len(reports), MAX_PROMPT_TOKENS):
            piece = reports[first : first + MAX_PROMPT_TOKENS]
            self._prompts.append(pb.PromptLogprobs(handle=recipient.handle, tokens=piece))
        self._changed.set()

    def text(self, recipient: Recipient, text: str) -> None:
        """Adds text that was held back."""
        self._waiting(recipient).texts.append(text)

    def whole(self, output: Output) -> None:
        """Adds all that a request has made, or more of it."""
        self._waiting(output.recipient).extend(output)

    def heartbeat(self, beat: pb.Heartbeat) -> None:
        """Sent before all that waits; in the place of one that was not read yet."""
        self._heartbeat = beat
        self.flush()

    def end(self, ending: Ending) -> None:
        """The last word of a request, sent after its tokens."""
        self._endings.append(ending)
        self._changed.set()

    async def room(self) -> None:
        """Waits while too many ended requests are unread."""
        while len(self._endings) >= MAX_UNREAD_ENDINGS:
            self._read.clear()
            await self._read.wait()

    def close(self) -> None:
        """No message follows."""
        self._closed = True
        self._changed.set()

    async def responses(self) -> AsyncIterator[pb.GenerateResponse]:
        """Everything put in, in order for each request, until closed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._yielding = True
            for response in self._taken():
                yield response
            self._yielding = False
            self._read.set()
            if self._closed and not (self._prompts or self._outputs or self._endings):
                return

    def _waiting(self, recipient: Recipient) -> Output:
        waiting = self._outputs.get(recipient.request_id)
        if waiting is None:
            waiting = self._outputs[recipient.request_id] = Output(recipient=recipient)
            if self._sink is None:
                self._changed.set()
        return waiting

    def _taken(self) -> Iterator[pb.GenerateResponse]:
        """What waits, as messages."""
        outputs, self._outputs = list(self._outputs.values()), {}
        endings, self._endings = self._endings, []
        beat, self._heartbeat = self._heartbeat, None
        prompts, self._prompts = self._prompts, []
        if beat is not None:
            yield pb.GenerateResponse(heartbeat=beat)
        for prompt in prompts:
            yield pb.GenerateResponse(step=pb.StepOutput(prompt_logprobs=[prompt]))
        if outputs or endings:
            yield from (_in_columns if self.columns else _one_by_one)(outputs, endings)


def _in_columns(
    outputs: Sequence[Output], endings: Sequence[Ending]
) -> Iterator[pb.GenerateResponse]:
    """An ending comes with the last tokens of its request: no connection breaks between them."""
    if sum(len(output.token_ids) for output in outputs) <= _FEW_TOKENS:
        yield pb.GenerateResponse(step=_columns(outputs, endings))
        return
    groups = _groups(outputs)
    last = {output.recipient: at for at, group in enumerate(groups) for output in group}
    for at, group in enumerate(groups):
        ended = [one for one in endings if last.get(one.recipient, 0) == at]
        yield pb.GenerateResponse(step=_columns(group, ended))


def _columns(outputs: Sequence[Output], endings: Sequence[Ending]) -> pb.StepOutput:
    return pb.StepOutput(
        handles=[output.recipient.handle for output in outputs],
        token_counts=[len(output.token_ids) for output in outputs],
        token_ids=[token for output in outputs for token in output.token_ids],
        texts=["".join(output.texts) for output in outputs],
        logprobs=[
            pb.RequestLogprobs(handle=output.recipient.handle, tokens=output.logprobs)
            for output in outputs
            if output.logprobs
        ],
        ends=[_request_end(ending) for ending in endings],
    )


def _request_end(ending: Ending) -> pb.RequestEnd:
    handle, end = ending.recipient.handle, ending.end
    if isinstance(end, pb.GenerationError):
        return pb.RequestEnd(handle=handle, error=end)
    return pb.RequestEnd(handle=handle, finished=end)


def _one_by_one(
    outputs: Sequence[Output], endings: Sequence[Ending]
) -> Iterator[pb.GenerateResponse]:
    for piece in (piece for output in outputs for piece in _pieces(output)):
        delta = pb.TokenDelta(
            token_ids=piece.token_ids, text="".join(piece.texts), logprobs=piece.logprobs
        )
        yield pb.GenerateResponse(request_id=piece.recipient.request_id, delta=delta)
    for ending in endings:
        request_id, end = ending.recipient.request_id, ending.end
        if isinstance(end, pb.GenerationError):
            yield pb.GenerateResponse(request_id=request_id, error=end)
        else:
            yield pb.GenerateResponse(request_id=request_id, finished=end)


def _groups(outputs: Sequence[Output]) -> list[list[Output]]:
    """Outputs that fit into a message together, at least one group. A handle is once in each."""
    groups: list[list[Output]] = [[]]
    room = MAX_COLUMN_BYTES
    for piece in (piece for output in outputs for piece in _pieces(output)):
        room -= piece.size
        if groups[-1] and (room < 0 or groups[-1][-1].recipient == piece.recipient):
            groups.append([])
            room = MAX_COLUMN_BYTES - piece.size
        groups[-1].append(piece)
    return groups


def _pieces(output: Output) -> Iterator[Output]:
    """The output, cut where its tokens are too much for one message. Each piece has the text that
    its tokens complete: whoever gets no more than some can go on behind them elsewhere."""
    count = -(-output.size // MAX_COLUMN_BYTES)
    if count <= 1 or not output.token_ids:
        yield output
        return
    each = -(-len(output.token_ids) // count)
    for start in range(0, len(output.token_ids), each):
        stop = start + each
        ends = stop >= len(output.token_ids)
        yield Output(
            recipient=output.recipient,
            token_ids=output.token_ids[start:stop],
            texts=output.texts[start : None if ends else stop],
            logprobs=output.logprobs[start:stop],
        )
