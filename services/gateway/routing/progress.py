"""How far one choice of a request has come, and how it goes on at another worker.

Tokens depend on nothing but the prompt, the tokens before them and the seed. So a choice that has
lost its worker is started again behind the tokens that have come, and goes on as if nothing had
happened.
"""

import secrets
from dataclasses import dataclass, field
from typing import Final

from precast.proto.decode.v1 import decode_service_pb2 as pb

MAX_ATTEMPTS: Final = 6
"""Workers that may have a choice in a row without a token of it: it might be what ends them. Those
that can't be reached don't count, for after some crashes most known workers may be dead ones."""
MAX_MOVES: Final = 64
"""Workers that may have a choice in all."""


@dataclass(kw_only=True)
class Progress:
    """Of one choice. ``start`` is as it was asked for, and its own."""

    start: pb.StartGeneration
    tokens: list[int] = field(default_factory=list)
    """What has come: whether shown, held back or on its way."""
    attempts: int = 0
    moves: int = 0
    _tokens_before: int = 0
    """How many there were when a worker was lost last."""

    def __post_init__(self) -> None:
        if not self.start.sampling.HasField("seed"):  # a worker's own would be lost with it
            self.start.sampling.seed = secrets.randbits(64)

    @property
    def prompt_length(self) -> int:
        return len(self.start.prompt_token_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return self.prompt_length + len(self.tokens)

    def sent(self) -> None:
        """A worker has it."""
        self.attempts += 1
        self.moves += 1

    def refused(self) -> None:
        """It had no room for it: it was never there."""
        self.attempts -= 1
        self.moves -= 1

    def may_go_on(self) -> bool:
        """Whether to start it again, its worker being lost."""
        if len(self.tokens) > self._tokens_before:
            self.attempts = 0
        self._tokens_before = len(self.tokens)
        # one whose last token has come, but no end, can only be of a worker of an older version
        ends = len(self.tokens) >= self.start.stop.max_tokens > 0
        return self.attempts < MAX_ATTEMPTS and self.moves < MAX_MOVES and not ends

    def limit(self, context_length: int) -> None:
        """The context of the worker that has it first is where an open-ended one ends."""
        left = max(1, context_length - self.prompt_length)
        self.start.stop.max_tokens = min(self.start.stop.max_tokens, left)

    def next_start(self) -> pb.StartGeneration:
        """What the next worker is sent."""
        if self.moves == 0:
            return self.start
        again = pb.StartGeneration()
        again.CopyFrom(self.start)
        # From now on tokens come as they are made: they are what outlives the next worker.
        again.deliver_at_end = False
        if self.tokens:
            again.resumed_token_ids.extend(self.tokens)
            again.ClearField("prompt_logprobs")  # they came before the first token
        return again
