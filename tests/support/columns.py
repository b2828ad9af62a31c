"""Requests on a stream of columns, which has what messages of single requests have no room for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from queue import Queue

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.server import COLUMNS
from tests.support.decode_worker import DecodeWorker


@dataclass(kw_only=True)
class ColumnAnswer:
    """One request's whole output."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    prompt: list[pb.TokenLogprob] = field(default_factory=list)
    """Log-probabilities of its prompt."""
    pieces: int = 0
    """Messages that those came in."""
    end: pb.RequestEnd = field(default_factory=pb.RequestEnd)

    @property
    def reason(self) -> int:
        assert self.end.WhichOneof("end") == "finished", self.end
        return self.end.finished.reason


def generate(
    worker: DecodeWorker, starts: Mapping[str, pb.StartGeneration], timeout_s: float = 60.0
) -> dict[str, ColumnAnswer]:
    """All of them at once; their answers by name."""
    requests: Queue[pb.GenerateRequest | None] = Queue()
    answers = {name: ColumnAnswer() for name in starts}
    for handle, (name, start) in enumerate(starts.items(), start=1):
        requests.put(pb.GenerateRequest(request_id=name, handle=handle, start=start))
    call = worker.stub().Generate(iter(requests.get, None), metadata=[COLUMNS], timeout=timeout_s)
    by_handle = dict(enumerate(answers.values(), start=1))
    left = len(answers)
    while left:
        left -= _take(next(call).step, by_handle)
    call.cancel()
    return answers


def _take(step: pb.StepOutput, answers: Mapping[int, ColumnAnswer]) -> int:
    """How many have ended."""
    rest = list(step.token_ids)
    for piece in step.prompt_logprobs:
        assert not answers[piece.handle].token_ids, "prompts come first"
        answers[piece.handle].prompt += piece.tokens
        answers[piece.handle].pieces += 1
    for handle, count, text in zip(step.handles, step.token_counts, step.texts, strict=True):
        answers[handle].token_ids += rest[:count]
        rest = rest[count:]
        answers[handle].text += text
    for report in step.logprobs:
        answers[report.handle].logprobs += report.tokens
    for end in step.ends:
        answers[end.handle].end = end
    return len(step.ends)
