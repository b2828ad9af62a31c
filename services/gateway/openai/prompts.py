"""From what clients write to the token ids of prompts."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from precast.errors import InvalidRequest
from precast.tokenizer.chat_template import ChatOptions, ChatTemplate
from precast.tokenizer.model_tokenizer import ModelTokenizer
from services.gateway.openai.errors import invalid
from services.gateway.openai.infilling import infilling_of
from services.gateway.openai.lengths import LimitedTokenizer
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.template_messages import template_messages
from services.gateway.openai.tools.earlier import CallStyle, shown_earlier, style_of
from services.gateway.openai.tools.generic import explained, in_users_words
from services.gateway.openai.tools.shown import with_descriptions, with_tools
from services.gateway.openai.tools.use import ToolUse

_RESERVED: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of a template that have fields of their own."""
_NO_THOUGHT: Final = ("none", "minimal")


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A chat as the model gets it."""

    ids: list[int]
    text: str


async def completion_prompts(
    body: CompletionRequest, tokenizer: ModelTokenizer, limited: LimitedTokenizer
) -> list[list[int]]:
    """Token ids of each prompt, whether it came as text or as ids. Raises ``ApiError`` 400."""
    special = body.add_special_tokens is not False and not body.suffix
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    encoded = iter(await limited.encode(texts, "prompt", add_special_tokens=special))
    ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    if body.suffix:
        ids = await _with_suffix(ids, body.suffix, tokenizer, limited)
    for prompt in ids:
        if not prompt:
            raise invalid("Invalid 'prompt': it has no tokens.", "prompt")
        check_ids("prompt", prompt, tokenizer)
    return ids


async def _with_suffix(
    prompts: list[list[int]], suffix: str, tokenizer: ModelTokenizer, limited: LimitedTokenizer
) -> list[list[int]]:
    infilling = infilling_of(tokenizer.tokenizer, tokenizer.model)
    (after,) = await limited.encode([suffix], "suffix", add_special_tokens=False)
    return [infilling.prompt(prompt, after) for prompt in prompts]


class Truncated(Protocol):
    """A body that says how much of its prompts is wanted."""

    @property
    def truncate_prompt_tokens(self) -> int | None: ...


def truncated(body: Truncated, ids: list[int], most: int) -> list[int]:
    """The prompt's last tokens, as many as were asked for; ``most``: that the context takes."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == 0:
        raise invalid("Invalid 'truncate_prompt_tokens': must not be 0.", "truncate_prompt_tokens")
    return ids[-(most if keep == -1 else keep) :]


async def chat_prompt(
    body: ChatRequest,
    tokenizer: ModelTokenizer,
    limited: LimitedTokenizer,
    use: ToolUse | None,
    *,
    allow_control_tokens: bool,
) -> ChatPrompt:
    """Raises ``ApiError`` 400."""
    _check_variables(body)
    messages, options = await _for_template(body, tokenizer, use)
    encode = partial(
        limited.encode_chat,
        options=options,
        allow_control_tokens=allow_control_tokens,
        add_special_tokens=bool(body.add_special_tokens),
    )
    try:
        try:
            ids, text = await encode(messages)
        except InvalidRequest:
            if not _has_our_system(body, use):
                raise
            ids, text = await encode(in_users_words(messages))
    except InvalidRequest as error:
        raise invalid(str(error), "messages") from None
    if not ids:
        raise invalid("Invalid 'messages': they have no tokens.", "messages")
    return ChatPrompt(ids=ids, text=text)


async def _for_template(
    body: ChatRequest, tokenizer: ModelTokenizer, use: ToolUse | None
) -> tuple[list[Mapping[str, Any]], ChatOptions]:
    """Messages as the model's template takes them, and what else it is told."""
    shown: Sequence[Mapping[str, Any]] = [] if use is None else use.shown
    placeholders: Mapping[str, str] = {}
    instructs = use is not None and use.form.instructs
    template = tokenizer.template(tools=use is not None and not instructs)
    if instructs:
        messages, shown = explained(template_messages(body.messages, template.source), shown), []
    else:
        style = await _call_style(body, template)
        messages, placeholders = shown_earlier(body.messages, template.source, style)
        messages = with_tools(messages, shown, template.source)
    return messages, ChatOptions(
        tools=with_descriptions(shown, template.source),
        variables=_variables(body, template.source),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        placeholders=placeholders,
    )


def _has_our_system(body: ChatRequest, use: ToolUse | None) -> bool:
    """Whether the first message explains tools, and the client has written no system message."""
    roles = {message.role for message in body.messages}
    return use is not None and use.form.instructs and not roles & {"system", "developer"}


async def _call_style(body: ChatRequest, template: ChatTemplate) -> CallStyle:
    """How the calls of the chat have to be shown, if there are any."""
    if not any(message.role == "tool" or message.tool_calls for message in body.messages):
        return CallStyle()
    # In a thread, because a template may take as long as it is allowed to.
    return await asyncio.to_thread(style_of, template)


def _check_variables(body: ChatRequest) -> None:
    for name in sorted(_RESERVED & (body.chat_template_kwargs or {}).keys()):
        field = "chat_template_kwargs"
        raise invalid(f"Invalid '{field}': can't have {name!r}.", f"{field}.{name}")
    if body.continue_final_message and body.add_generation_prompt:
        field = "continue_final_message"
        raise invalid(f"Invalid '{field}': it excludes add_generation_prompt.", field)


def _variables(body: ChatRequest, template: str) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort, **variables}
    if "enable_thinking" in template:
        return {"enable_thinking": effort not in _NO_THOUGHT, **variables}
    if effort not in _NO_THOUGHT:
        message = (
            "'reasoning_effort' is not supported: the model's chat template has no use for it."
        )
        raise invalid(message, "reasoning_effort", "unsupported_parameter")
    return variables


def check_ids(field: str, ids: Sequence[int], tokenizer: ModelTokenizer) -> None:
    """Raises ``ApiError`` 400 for an id that the model doesn't have."""
    wrong = max(ids, default=0)
    if wrong >= tokenizer.vocab_size:
        reason = f"token id {wrong} is not in the vocabulary of {tokenizer.vocab_size}"
        raise invalid(f"Invalid '{field}': {reason}.", field)
