"""From a request's body to what the workers are asked for.

A plan is checked completely: what a worker could refuse for good, the gateway refuses first, with
the name of the field.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from msgspec import UNSET

from precast.errors import PrecastError
from precast.log import get_logger
from precast.tokenizer.model_tokenizer import ModelTokenizer, TokenizerStore
from services.gateway.openai.bad_words import banned_tokens
from services.gateway.openai.chat_constraint import chat_constraint, special_ids
from services.gateway.openai.checks import check_choices, check_fields, check_free, scored
from services.gateway.openai.embeddings.fields import EmbeddingRequest, Pooling
from services.gateway.openai.embeddings.prepare import embedding_plan
from services.gateway.openai.errors import internal, invalid
from services.gateway.openai.fingerprint import fingerprint
from services.gateway.openai.harmony import writes_harmony
from services.gateway.openai.interpret import Reading, thinking_of
from services.gateway.openai.lengths import LimitedTokenizer, make_gate
from services.gateway.openai.plan import Plan
from services.gateway.openai.prompts import chat_prompt, check_ids, completion_prompts, truncated
from services.gateway.openai.reasoning import CLOSE, OPEN
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.starts import Wanted, fitting, start_of, stops_of, what_is_left
from services.gateway.openai.structured.constraint import asked_of, constraint_of
from services.gateway.openai.tokenizing import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)
from services.gateway.openai.tools.formats import format_of
from services.gateway.openai.tools.use import tool_use
from services.gateway.routing.pool import WorkerPool

log = get_logger(__name__)

_DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's default of ``max_tokens`` for completions; a chat's is what the context has left."""


@dataclass(frozen=True, kw_only=True)
class Parsers:
    """How prompts are written and answers are read, where a template doesn't decide it."""

    tools: str = "auto"
    reasoning: str = "auto"
    allow_control_tokens: bool = False


class Planner:
    """Makes plans out of bodies."""

    def __init__(
        self, pool: WorkerPool, tokenizers: TokenizerStore, parsers: Parsers = Parsers()
    ) -> None:
        self._pool = pool
        self._tokenizers = tokenizers
        self._parsers = parsers
        self._gate = make_gate()

    async def completion(self, body: CompletionRequest) -> Plan:
        limit = self._pool.max_context_length(body.model)
        check_choices(body)
        tokenizer = await self._tokenizer(body.model)
        check_fields(body, tokenizer)
        limited = LimitedTokenizer(tokenizer, limit, self._gate)
        whole = await completion_prompts(body, tokenizer, limited)
        most = limit if body.asked_tokens == 0 else limit - 1
        prompts = [truncated(body, ids, most) for ids in whole]
        each = body.generated_per_prompt
        wanted = _wanted(body, stops_of(body, tokenizer, limit, len(prompts) * each))
        wanted = replace(wanted, banned=await banned_tokens(body.bad_words or (), limited))
        check_free(body, wanted)
        starts = [
            start_of(body, ids, _completion_budget(body, len(ids), limit), wanted, choice)
            for ids in prompts
            for choice in range(each)
        ]
        echoes = _echoes(body, whole, prompts, tokenizer)
        return Plan(
            endpoint="completions",
            model=body.model,
            starts=tuple(starts),
            echoes=tuple(echo for echo in echoes for _ in range(each)),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            prompt_tokens=sum(map(len, prompts)),
            choices_per_prompt=each,
            shown_per_prompt=body.choices_per_prompt,
            shows_logprobs=body.logprobs is not None,
            echoes_logprobs=bool(body.echo) and body.logprobs is not None,
            shows_prompt_logprobs=body.prompt_logprobs is not None,
            shows_token_ids=bool(body.return_token_ids),
            asked=asked_of(body),
            fingerprint=fingerprint(self._pool, body.model),
            open_ended=body.asked_tokens is None,
            tokenizer_digest=tokenizer.digest,
            session=body.prompt_cache_key or "",
        )

    async def chat(self, body: ChatRequest) -> Plan:
        limit = self._pool.max_context_length(body.model)
        tokenizer = await self._tokenizer(body.model)
        check_fields(body, tokenizer)
        limited = LimitedTokenizer(tokenizer, limit, self._gate)
        template = tokenizer.template(tools=bool(body.tools)).source
        use = tool_use(body, format_of(template, self._parsers.tools))
        allow = self._parsers.allow_control_tokens
        prompt = await chat_prompt(body, tokenizer, limited, use, allow_control_tokens=allow)
        ids = truncated(body, prompt.ids, limit - 1)
        reading = Reading(
            thinking=thinking_of(template, prompt.text, self._parsers.reasoning),
            show_reasoning=body.include_reasoning is not False,
            marks_of_thought=_marks_of_thought(tokenizer),
            tools=use,
            harmony=self._parsers.reasoning != "none" and writes_harmony(template),
        )
        count = body.choices_per_prompt
        wanted = Wanted(
            stops=stops_of(body, tokenizer, limit, count),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            banned=await banned_tokens(body.bad_words or (), limited),
            constraint=chat_constraint(body, use, tokenizer, reading),
            show_special_tokens=body.skip_special_tokens is False
            or bool(special_ids(reading.marks, tokenizer)),
        )
        check_free(body, wanted)
        budget = _chat_budget(body, len(ids), limit)
        return Plan(
            endpoint="chat",
            model=body.model,
            starts=tuple(start_of(body, ids, budget, wanted, i) for i in range(count)),
            echoes=("",) * count,
            stream=bool(body.stream),
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            prompt_tokens=len(ids),
            choices_per_prompt=count,
            shown_per_prompt=count,
            shows_logprobs=bool(body.logprobs),
            shows_prompt_logprobs=body.prompt_logprobs is not None,
            shows_token_ids=bool(body.return_token_ids),
            asked=asked_of(body),
            reading=reading,
            short_call_ids=use is not None and use.form.short_ids,
            fingerprint=fingerprint(self._pool, body.model),
            open_ended=body.asked_tokens is None,
            tokenizer_digest=tokenizer.digest,
            session=body.prompt_cache_key or "",
        )

    async def embedding(self, body: EmbeddingRequest, pooling: Pooling) -> Plan:
        """``pooling``: where the body asks for none."""
        limit = self._pool.max_context_length(body.model)
        tokenizer = await self._tokenizer(body.model)
        limited = LimitedTokenizer(tokenizer, limit, self._gate)
        mark = fingerprint(self._pool, body.model)
        return await embedding_plan(body, tokenizer, limited, limit, pooling, mark)

    async def tokenize(self, body: TokenizeRequest) -> Tokenized:
        """Raises as the requests do whose prompt it is."""
        limit = self._pool.max_context_length(body.model)
        tokenizer = await self._tokenizer(body.model)
        limited = LimitedTokenizer(tokenizer, limit, self._gate)
        if body.prompt == "":  # which completions don't take
            special = body.add_special_tokens is not False
            [ids] = await tokenizer.encode([""], add_special_tokens=special)
        elif body.prompt is not None:
            [ids] = await completion_prompts(body.completion(), tokenizer, limited)
        else:
            ids = await self._chat_ids(body.chat(), tokenizer, limited)
        names = [tokenizer.tokenizer.id_to_token(token) or "" for token in ids]
        return Tokenized(
            count=len(ids),
            max_model_len=limit,
            tokens=ids,
            token_strs=names if body.return_token_strs else UNSET,
        )

    async def count(self, body: ChatRequest) -> int:
        """Tokens of the chat's prompt. Raises as the chat does."""
        limit = self._pool.max_context_length(body.model)
        tokenizer = await self._tokenizer(body.model)
        limited = LimitedTokenizer(tokenizer, limit, self._gate)
        return len(await self._chat_ids(body, tokenizer, limited))

    async def _chat_ids(
        self, chat: ChatRequest, tokenizer: ModelTokenizer, limited: LimitedTokenizer
    ) -> list[int]:
        template = tokenizer.template(tools=bool(chat.tools)).source
        use = tool_use(chat, format_of(template, self._parsers.tools))
        allow = self._parsers.allow_control_tokens
        prompt = await chat_prompt(chat, tokenizer, limited, use, allow_control_tokens=allow)
        return prompt.ids

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        self._pool.max_context_length(body.model)  # raises for an unknown model
        tokenizer = await self._tokenizer(body.model)
        check_ids("tokens", body.tokens, tokenizer)
        return Detokenized(prompt=tokenizer.decode(body.tokens))

    async def tokenizer_info(self, model: str) -> TokenizerInfo:
        limit = self._pool.max_context_length(model)
        tokenizer = await self._tokenizer(model)
        tokens = tokenizer.chat_template.variables
        return TokenizerInfo(
            model=model,
            max_model_len=limit,
            vocab_size=tokenizer.vocab_size,
            chat_template=tokenizer.chat_template.source or None,
            bos_token=tokens.get("bos_token"),
            eos_token=tokens.get("eos_token"),
            pad_token=tokens.get("pad_token"),
            unk_token=tokens.get("unk_token"),
        )

    async def _tokenizer(self, model: str) -> ModelTokenizer:
        """The one that the model's workers have: of its folder, or of the folder that was there
        before, where a worker goes on with that. Raises ``ApiError`` or ``WorkerUnavailable``."""
        folder = self._pool.base_of(model)
        tokenizer = await self._read_tokenizer(folder)
        if self._pool.reads_as(model, tokenizer.digest):
            return tokenizer
        for earlier in await self._tokenizers.earlier(folder):
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


def _marks_of_thought(tokenizer: ModelTokenizer) -> tuple[int | None, int | None]:
    first, last = (tokenizer.tokenizer.token_to_id(mark) for mark in (OPEN, CLOSE))
    return first, last


def _wanted(body: CompletionRequest, stops: Sequence[str]) -> Wanted:
    logprobs = body.logprobs
    if logprobs is None and body.generated_per_prompt > body.choices_per_prompt:
        logprobs = 0  # for the likeliest to be found
    return Wanted(
        stops=stops,
        logprobs=logprobs,
        prompt_logprobs=scored(body),
        constraint=constraint_of(body),
        show_special_tokens=body.skip_special_tokens is False,
    )


def _echoes(
    body: CompletionRequest,
    whole: list[list[int]],
    prompts: list[list[int]],
    tokenizer: ModelTokenizer,
) -> list[str]:
    """The texts of prompts: as they were written, where they are whole."""
    if not body.echo:
        return [""] * len(prompts)
    return [
        given if isinstance(given, str) and len(ids) == len(kept) else tokenizer.decode(kept)
        for given, ids, kept in zip(body.prompts, whole, prompts, strict=True)
    ]


def _completion_budget(body: CompletionRequest, prompt: int, limit: int) -> int:
    """Tokens to generate: what was asked for, else the default or what the context has left."""
    if body.asked_tokens is None:
        usual = _DEFAULT_COMPLETION_TOKENS if body.n_predict is None else limit
        return what_is_left(usual, prompt, limit, "prompt")
    return fitting(body.asked_tokens, prompt, limit, "prompt")


def _chat_budget(body: ChatRequest, prompt: int, limit: int) -> int:
    asked = body.asked_tokens
    if body.n_predict == 0:
        raise invalid("Invalid 'n_predict': must be at least 1, or -1.", "n_predict")
    if asked is None:
        return what_is_left(limit, prompt, limit, "messages")
    return fitting(asked, prompt, limit, "messages")
