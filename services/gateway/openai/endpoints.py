"""How each endpoint shows what was generated."""

from collections.abc import Callable, Mapping
from typing import Final

from services.gateway.openai.chat_format import ChatFormat
from services.gateway.openai.completion_format import CompletionFormat
from services.gateway.openai.embeddings.format import EmbeddingFormat
from services.gateway.openai.formats import Format
from services.gateway.openai.messages_api.format import MessagesFormat
from services.gateway.openai.plan import Endpoint, Plan
from services.gateway.openai.responses_api.format import ResponsesFormat

_FORMATS: Final[Mapping[Endpoint, Callable[[Plan], Format]]] = {
    "completions": CompletionFormat,
    "chat": ChatFormat,
    "responses": ResponsesFormat,
    "messages": MessagesFormat,
    "embeddings": EmbeddingFormat,
}


def make_format(plan: Plan) -> Format:
    """For one request."""
    return _FORMATS[plan.endpoint](plan)
