"""One HTTP request, ready to run: what the workers are asked for, and how it is answered."""

from dataclasses import dataclass
from typing import Final, Literal

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai.interpret import PLAIN, Reading
from services.gateway.openai.structured.constraint import Asked

OPEN_ENDED_TOKENS: Final = 1024
"""What an answer is expected to have, at most, that may be as long as the context allows."""

Endpoint = Literal["completions", "chat", "responses", "messages", "embeddings"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One HTTP request, ready to run."""

    endpoint: Endpoint
    model: str
    starts: tuple[pb.StartGeneration, ...]
    """One for each choice, prompt after prompt."""
    echoes: tuple[str, ...]
    """Text to put before each choice; empty strings without ``echo``."""
    stream: bool
    include_usage: bool
    continuous_usage: bool
    """Every chunk of a stream carries the usage up to it."""
    prompt_tokens: int
    """Of all prompts, each counted once."""
    choices_per_prompt: int
    """That are generated."""
    shown_per_prompt: int
    """The likeliest of them, which the answer has."""
    shows_logprobs: bool = False
    echoes_logprobs: bool = False
    """The prompts' tokens are shown with their probabilities."""
    shows_prompt_logprobs: bool = False
    """The prompts' tokens are shown with their probabilities, as vLLM does it."""
    shows_token_ids: bool = False
    asked: Asked | None = None
    """What the answer has to be, apart from calls of tools."""
    reading: Reading = PLAIN
    """How answers are read."""
    short_call_ids: bool = False
    fingerprint: str
    """Of model and build."""
    origin: object = None
    """The body as the client wrote it, for endpoints that show it."""
    open_ended: bool = False
    """No number of tokens was asked for: a worker that can hold the prompts gives what its context
    has left."""
    tokenizer_digest: str = ""
    """Of the tokenizer that made the prompts; empty: not known."""
    session: str = ""
    """Requests of the same one go to the same worker; empty: of none."""

    @property
    def expected_tokens(self) -> int:
        """Of prompts and answers: the most that there may be, where the body says how many."""
        most = OPEN_ENDED_TOKENS if self.open_ended else 2**31
        return self.prompt_tokens + sum(min(one.stop.max_tokens, most) for one in self.starts)
