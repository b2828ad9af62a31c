"""Bodies of requests that the reference shows."""

from typing import Any, Final

from pydantic import BaseModel

from services.gateway.openai.embeddings.fields import EmbeddingRequest
from services.gateway.openai.responses_api.fields import ResponsesRequest
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.tokenizing import DetokenizeRequest, TokenizeRequest

_MODEL: Final = "smollm2"
_CITY: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
_WEATHER: Final = {"name": "weather", "description": "Tells the weather.", "parameters": _CITY}
_QUESTION: Final = [{"role": "user", "content": "What is the weather in Paris?"}]

EXAMPLES: Final[dict[type[BaseModel], dict[str, Any]]] = {
    CompletionRequest: {
        "text": {"value": {"model": _MODEL, "prompt": "Once upon a time", "max_tokens": 32}},
        "score a prompt": {
            "value": {
                "model": _MODEL,
                "prompt": ["The sky is blue.", "The sky is green."],
                "max_tokens": 0,
                "echo": True,
                "logprobs": 1,
            }
        },
    },
    ChatRequest: {
        "chat": {"value": {"model": _MODEL, "messages": _QUESTION, "stream": True}},
        "tools": {
            "value": {
                "model": _MODEL,
                "messages": _QUESTION,
                "tools": [{"type": "function", "function": _WEATHER}],
                "tool_choice": "required",
            }
        },
        "structured output": {
            "value": {
                "model": _MODEL,
                "messages": _QUESTION,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "place", "schema": _CITY, "strict": True},
                },
            }
        },
    },
    ResponsesRequest: {
        "text": {"value": {"model": _MODEL, "input": "Tell me a story.", "stream": True}},
        "tools": {
            "value": {
                "model": _MODEL,
                "input": "What is the weather in Paris?",
                "tools": [{"type": "function", **_WEATHER}],
            }
        },
    },
    EmbeddingRequest: {
        "texts": {"value": {"model": _MODEL, "input": ["The sky is blue.", "Grass is green."]}}
    },
    TokenizeRequest: {"chat": {"value": {"model": _MODEL, "messages": _QUESTION}}},
    DetokenizeRequest: {"tokens": {"value": {"model": _MODEL, "tokens": [1, 2, 3]}}},
}
