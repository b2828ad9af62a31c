"""What the tokens of a request are measured by, as they come."""

import time
from typing import Final

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.telemetry import Attributes
from services.gateway.metrics import Metrics
from services.gateway.openai.interpret import ThoughtCounter
from services.gateway.openai.plan import Plan
from services.gateway.routing.event_queue import Delta, Event

_OPERATIONS: Final = {"completions": "text_completion", "embeddings": "embeddings"}
"""As OpenTelemetry calls endpoints; the others are chats."""
_MOST_NOTED: Final = 128
_MOST_NOTED_S: Final = 1.0


class TokenWatch:
    """Measures a stream's times to and between tokens, and counts tokens."""

    def __init__(self, plan: Plan, metrics: Metrics, started: float) -> None:
        self._used = plan.prompt_tokens
        self._noted: list[tuple[int, int, float]] = []
        """Choices that got tokens, how many and when, that are not measured yet."""
        self._plan = plan
        self._started = started
        self._last: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._timed = plan.stream
        self._ends: dict[int, pb.GenerationFinished] = {}
        self._first_token = metrics.first_token_seconds.of(plan.model)
        self._inter_token = metrics.inter_token_seconds.of(plan.model)
        self._counter = metrics.completion_tokens.labels(plan.model)
        self._thoughts = [ThoughtCounter(plan.reading) for _ in plan.starts]
        self._reasons = plan.reading.thinking != "none"
        metrics.prompt_tokens.labels(plan.model).inc(plan.prompt_tokens)

    @property
    def used(self) -> int:
        """Tokens of the prompts, and of the answers as far as they have come."""
        self._measure()
        return self._used

    @property
    def ends(self) -> list[pb.GenerationFinished]:
        """Of the choices that have finished, in their order."""
        return [self._ends[index] for index in sorted(self._ends)]

    @property
    def reasoning_tokens(self) -> int | None:
        """Of all answers; None of a model that doesn't reason."""
        return sum(one.count for one in self._thoughts) if self._reasons else None

    def attributes(self) -> Attributes:
        """For a trace."""
        return {
            "gen_ai.request.model": self._plan.model,
            "gen_ai.operation.name": _OPERATIONS.get(self._plan.endpoint, "chat"),
            "gen_ai.usage.input_tokens": self._plan.prompt_tokens,
            "gen_ai.usage.output_tokens": self.used - self._plan.prompt_tokens,
        }

    def see(self, index: int, event: Event) -> None:
        if isinstance(event, pb.GenerationFinished):
            self._measure()
            self._ends[index] = event
            self._used += event.completion_tokens - self._seen.pop(index, 0)
            self._counter.inc(event.completion_tokens)
        else:
            self.see_delta(index, event)

    def see_delta(self, index: int, delta: Delta) -> None:
        if self._reasons:
            self._thoughts[index].add(delta.token_ids)
        if self._timed:
            self.see_tokens(index, delta.tokens, time.monotonic())

    def see_tokens(self, index: int, tokens: int, now: float) -> None:
        """Of a stream of a model that doesn't reason. Measured with others, at most a second late:
        what is touched for a single token is what that costs."""
        noted = self._noted
        noted.append((index, tokens, now))
        if len(noted) >= _MOST_NOTED or now - noted[0][2] >= _MOST_NOTED_S:
            self._measure()

    def close(self) -> None:
        """Measures what is not yet."""
        self._measure()

    def _measure(self) -> None:
        noted, self._noted = self._noted, []
        gaps = list[float]()
        for index, tokens, now in noted:
            last = self._last.get(index)
            if last is None and not self._last:
                self._first_token.observe(now - self._started)
            elif last is not None and tokens == 1:  # nearly always
                gaps.append(now - last)
            elif last is not None and tokens:
                self._inter_token.observe((now - last) / tokens, tokens)
            self._last[index] = now
            self._seen[index] = self._seen.get(index, 0) + tokens
        self._used += sum(tokens for _, tokens, _ in noted)
        self._inter_token.observe_all(gaps)
