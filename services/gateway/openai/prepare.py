"""From a request's body to what the workers are asked for.

A plan is checked completely: what a worker could refuse for good, the gateway refuses first, with
the name of the field.
"""

from dataclasses import dataclass
from typing import Final, Literal

from precast.errors import InvalidRequest, PrecastError
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.tokenizer.model_tokenizer import ModelTokenizer, TokenizerStore
from services.gateway.openai.errors import context_length_exceeded, internal, invalid
from services.gateway.openai.fields import MAX_CHOICES
from services.gateway.openai.lengths import LimitedTokenizer, make_gate
from services.gateway.openai.messages import Message
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.routing.pool import WorkerPool

log = get_logger(__name__)

_DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's default of ``max_tokens`` for completions; a chat's is what the context has left."""
_MAX_STOP_TEXT: Final = 8 << 20
"""Characters of all choices' stop strings."""
_SEED_MASK: Final = 2**64 - 1

Endpoint = Literal["completions", "chat"]


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
    open_ended: bool = False
    """No number of tokens was asked for: a worker that can hold the prompts gives what its context
    has left."""
    tokenizer_digest: str = ""
    """Of the tokenizer that made the prompts; empty: not known."""


class Planner:
    """Makes plans out of bodies."""

    def __init__(
        self, pool: WorkerPool, tokenizers: TokenizerStore, *, allow_control_tokens: bool = False
    ) -> None:
        self._pool = pool
        self._tokenizers = tokenizers
        self._allow_control_tokens = allow_control_tokens
        self._gate = make_gate()

    async def completion(self, body: CompletionRequest) -> Plan:
        limit = self._pool.max_context_length(body.model)
        _check_choices(body)
        tokenizer = await self._tokenizer(body.model)
        limited = LimitedTokenizer(tokenizer, limit, self._gate)
        prompts = await _completion_prompts(body.prompts, tokenizer, limited)
        stops = _stops(body, tokenizer, limit, len(prompts) * body.choices_per_prompt)
        starts = [
            _start(
                body, ids, _completion_budget(body, len(ids), limit), stops, body.logprobs, choice
            )
            for ids in prompts
            for choice in range(body.choices_per_prompt)
        ]
        _check_ids("logit_bias", list(body.logit_bias), tokenizer)
        echoes = [
            _echo(body, prompt, ids, tokenizer)
            for prompt, ids in zip(body.prompts, prompts, strict=True)
        ]
        return Plan(
            endpoint="completions",
            model=body.model,
            starts=tuple(starts),
            echoes=tuple(echo for echo in echoes for _ in range(body.choices_per_prompt)),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            prompt_tokens=sum(map(len, prompts)),
            choices_per_prompt=body.choices_per_prompt,
            open_ended=body.max_tokens is None,
            tokenizer_digest=tokenizer.digest,
        )

    async def chat(self, body: ChatRequest) -> Plan:
        limit = self._pool.max_context_length(body.model)
        tokenizer = await self._tokenizer(body.model)
        _check_ids("logit_bias", list(body.logit_bias), tokenizer)
        allow = self._allow_control_tokens
        limited = LimitedTokenizer(tokenizer, limit, self._gate)
        ids = await _chat_prompt(body, limited, allow_control_tokens=allow)
        max_tokens = _chat_budget(body, len(ids), limit)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        count = body.choices_per_prompt
        stops = _stops(body, tokenizer, limit, count)
        return Plan(
            endpoint="chat",
            model=body.model,
            starts=tuple(_start(body, ids, max_tokens, stops, logprobs, i) for i in range(count)),
            echoes=("",) * count,
            stream=bool(body.stream),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            prompt_tokens=len(ids),
            choices_per_prompt=count,
            open_ended=(body.max_completion_tokens or body.max_tokens) is None,
            tokenizer_digest=tokenizer.digest,
        )

    async def _tokenizer(self, model: str) -> ModelTokenizer:
        """The one that the model's workers have: of its folder, or of the folder that was there
        before, where a worker goes on with that. Raises ``ApiError`` or ``WorkerUnavailable``."""
        tokenizer = await self._read_tokenizer(model)
        if self._pool.reads_as(model, tokenizer.digest):
            return tokenizer
        for earlier in await self._tokenizers.earlier(model):
            if self._pool.reads_as(model, earlier.digest):
                return earlier
        raise self._pool.tokenizers_differ(model, tokenizer.digest)

    async def _read_tokenizer(self, model: str) -> ModelTokenizer:
        try:
            return await self._tokenizers.get(model)
        except PrecastError as error:
            # A worker serves the model, so the folder is the operator's problem, not the client's.
            log.error("tokenizer not loaded", model=model, reason=str(error))
            raise internal(f"The gateway can't read the tokenizer of {model!r}.") from error


def _check_choices(body: CompletionRequest) -> None:
    """Raises ``ApiError`` 400 for numbers that don't go together."""
    n, prompts = body.choices_per_prompt, len(body.prompts)
    if body.best_of is not None and body.best_of != n:
        raise invalid(f"Invalid 'best_of': must equal n = {n}.", "best_of")
    if prompts * n > MAX_CHOICES:
        asked = f"{prompts} prompts times n = {n}"
        raise invalid(f"Invalid 'n': {asked} is too much; at most {MAX_CHOICES} choices.", "n")


async def _completion_prompts(
    prompts: list[str | list[int]], tokenizer: ModelTokenizer, limited: LimitedTokenizer
) -> list[list[int]]:
    """Token ids of each prompt, whether it came as text or as ids."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await limited.encode(texts, "prompt", add_special_tokens=True))
    ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    for prompt in ids:
        if not prompt:
            raise invalid("Invalid 'prompt': it has no tokens.", "prompt")
        _check_ids("prompt", prompt, tokenizer)
    return ids


async def _chat_prompt(
    body: ChatRequest, tokenizer: LimitedTokenizer, *, allow_control_tokens: bool
) -> list[int]:
    messages = [_message(message) for message in body.messages]
    try:
        ids = await tokenizer.encode_chat(messages, allow_control_tokens=allow_control_tokens)
    except InvalidRequest as error:
        raise invalid(str(error), "messages") from None
    if not ids:
        raise invalid("Invalid 'messages': they have no tokens.", "messages")
    return ids


def _message(message: Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.text, **named}


def _check_ids(field: str, ids: list[int], tokenizer: ModelTokenizer) -> None:
    wrong = next((token for token in ids if token >= tokenizer.vocab_size), None)
    if wrong is not None:
        reason = f"token id {wrong} is not in the vocabulary of {tokenizer.vocab_size}"
        raise invalid(f"Invalid '{field}': {reason}.", field)


def _echo(
    body: CompletionRequest, prompt: str | list[int], ids: list[int], tokenizer: ModelTokenizer
) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else tokenizer.decode(ids)


def _completion_budget(body: CompletionRequest, prompt: int, limit: int) -> int:
    """Tokens to generate: what was asked for, else the default or what the context has left."""
    if body.max_tokens is None:
        return _what_is_left(_DEFAULT_COMPLETION_TOKENS, prompt, limit, "prompt")
    return _fitting(body.max_tokens, prompt, limit, "prompt")


def _chat_budget(body: ChatRequest, prompt: int, limit: int) -> int:
    asked = body.max_completion_tokens or body.max_tokens
    if asked is None:
        return _what_is_left(limit, prompt, limit, "messages")
    return _fitting(asked, prompt, limit, "messages")


def _what_is_left(wanted: int, prompt: int, limit: int, field: str) -> int:
    if prompt >= limit:
        raise context_length_exceeded(limit, prompt, 1, field)
    return min(wanted, limit - prompt)


def _fitting(asked: int, prompt: int, limit: int, field: str) -> int:
    if prompt + asked > limit:
        raise context_length_exceeded(limit, prompt, asked, field)
    return asked


def _stops(
    body: CompletionRequest | ChatRequest, tokenizer: ModelTokenizer, limit: int, choices: int
) -> list[str]:
    """Stop strings that can occur: others are longer than the text of a whole context.

    Raises ``ApiError`` 400 if the choices, each of which carries them, make too much of them.
    """
    stops = [stop for stop in body.stop if len(stop) <= limit * tokenizer.longest_token]
    if choices * sum(map(len, stops)) > _MAX_STOP_TEXT:
        raise invalid(f"Invalid 'stop': too much text for {choices} choices.", "stop")
    return stops


def _start(
    body: CompletionRequest | ChatRequest,
    ids: list[int],
    max_tokens: int,
    stops: list[str],
    logprobs: int | None,
    choice: int,
) -> pb.StartGeneration:
    """What the worker is sent for the ``choice``-th completion of one prompt."""
    stop = pb.StopConditions(
        max_tokens=max_tokens,
        stop_strings=stops,
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
    )
    return pb.StartGeneration(
        model=body.model,
        prompt_token_ids=ids,
        sampling=_sampling(body, choice),
        stop=stop,
        logprobs=logprobs,
        deliver_at_end=not body.stream,
        cache_salt=body.cache_salt or "",
    )


def _sampling(body: CompletionRequest | ChatRequest, choice: int) -> pb.SamplingParams:
    # One seed for all choices would make them equal.
    seed = None if body.seed is None else (body.seed + choice) & _SEED_MASK
    return pb.SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias,
    )
