"""The OpenAPI document: what the server does, no more and no less.

Schemas of requests come from their models, those of answers from their structs. The paths are
written here, because the framework would promise answers that are never sent.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway.openai import responses as api
from services.gateway.openai.embeddings.fields import EmbeddingRequest
from services.gateway.openai.embeddings.format import EmbeddingList
from services.gateway.openai.examples import EXAMPLES
from services.gateway.openai.messages_api.fields import CountTokensRequest, MessagesRequest
from services.gateway.openai.responses_api.fields import ResponsesRequest
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.tokenizing import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
    Version,
)

_Json = dict[str, Any]
_PREFIX: Final = "#/components/schemas/"
_ERROR: Final[_Json] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {
                    "type": ["string", "null"],
                    "description": "Path of the field, such as messages[1].content",
                },
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MESSAGES_ERROR: Final[_Json] = {
    "type": "object",
    "required": ["type", "error"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "additionalProperties": False,
            "properties": {
                "type": {
                    "enum": [
                        *("invalid_request_error", "authentication_error", "permission_error"),
                        *("not_found_error", "request_too_large", "rate_limit_error"),
                        *("api_error", "overloaded_error", "timeout_error"),
                    ]
                },
                "message": {"type": "string"},
            },
        },
    },
}
_COUNT: Final[_Json] = {
    "type": "object",
    "required": ["input_tokens"],
    "properties": {"input_tokens": {"type": "integer", "minimum": 1}},
}
_HEALTH: Final[_Json] = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"const": "ok"}},
}
_READY: Final[_Json] = {
    "type": "object",
    "required": ["status", "workers", "models"],
    "properties": {
        "status": {"const": "ready"},
        "workers": {"type": "integer", "minimum": 0},
        "models": {"type": "array", "items": {"type": "string"}},
    },
}
_RESPONSE: Final[_Json] = {
    "type": "object",
    "required": ["id", "object", "created_at", "status", "model", "output", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "response"},
        "created_at": {"type": "integer"},
        "status": {"enum": ["completed", "incomplete"]},
        "model": {"type": "string"},
        "output": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "type", "status"],
                "properties": {"type": {"enum": ["message", "reasoning", "function_call"]}},
            },
        },
        "usage": {"type": "object", "required": ["input_tokens", "output_tokens", "total_tokens"]},
    },
}
_DELETED: Final[_Json] = {
    "type": "object",
    "required": ["id", "object", "deleted"],
    "properties": {"object": {"const": "response"}, "deleted": {"const": True}},
}
_MESSAGE: Final[_Json] = {
    "type": "object",
    "required": ["id", "type", "role", "model", "content", "stop_reason", "usage"],
    "properties": {
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "content": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type"],
                "properties": {"type": {"enum": ["text", "thinking", "tool_use"]}},
            },
        },
        "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        "usage": {"type": "object", "required": ["input_tokens", "output_tokens"]},
    },
}
_IGNORED: Final[_Json] = {
    "X-Precast-Ignored-Fields": {
        "description": "Fields of the request that are not known, if there are any",
        "schema": {"type": "string"},
    }
}
_REQUESTS: Final = (
    *(CompletionRequest, ChatRequest, ResponsesRequest, MessagesRequest, CountTokensRequest),
    *(EmbeddingRequest, TokenizeRequest, DetokenizeRequest),
)
_GENERATION_ERRORS: Final = (400, 404, 408, 413, 415, 429, 500, 503, 504)


def document(*, keeps_responses: bool) -> _Json:
    """The whole document. ``keeps_responses``: whether responses may go on from earlier ones."""
    schemas = _schemas()
    if not keeps_responses:
        del schemas[ResponsesRequest.__name__]["properties"]["previous_response_id"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Precast", "version": "1", "description": "An OpenAI-compatible API."},
        "paths": _paths(),
        "components": {"schemas": schemas},
    }


def _paths() -> _Json:
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/completions": _generation("Complete texts", CompletionRequest, api.Completion),
        "/v1/chat/completions": _generation(
            "Answer a chat", ChatRequest, api.ChatCompletion, api.ChatChunk
        ),
        "/v1/responses": _responses(),
        "/v1/responses/{response_id}": _kept_response(),
        "/v1/messages": _messages(),
        "/v1/messages/count_tokens": _post(
            "Count the tokens of a chat in Anthropic's format",
            CountTokensRequest,
            _COUNT,
            _GENERATION_ERRORS,
            error="MessagesError",
        ),
        "/v1/embeddings": _posting("Embed texts", EmbeddingRequest, EmbeddingList),
        "/tokenize": _posting(
            "Count and show the tokens of a text or a chat", TokenizeRequest, Tokenized
        ),
        "/detokenize": _posting("Turn tokens into text", DetokenizeRequest, Detokenized),
        "/tokenizer_info": {
            "parameters": [{"name": "model", "in": "query", "schema": {"type": "string"}}],
            **_reading("Describe a model's tokenizer", _ref("TokenizerInfo"), 400, 404, 500, 503),
        },
        "/version": _reading("The version of the server", _ref("Version")),
        "/v1/models": _reading("List the models that are served", _ref("ModelList")),
        "/v1/models/{model}": {
            "parameters": [name],
            **_reading("Describe one model", _ref("Model"), 404),
        },
        "/health": _reading("Whether the process answers", _HEALTH),
        "/ready": _reading("Whether a worker is ready, or can be started", _READY, 503),
    }


def _generation(
    summary: str, request: type[BaseModel], whole: type, chunk: type | None = None
) -> _Json:
    data = {"type": "string", "description": f"JSON: {(chunk or whole).__name__}; last: [DONE]"}
    answer = _ref(whole.__name__)
    return _post(summary, request, answer, _GENERATION_ERRORS, data)


def _responses() -> _Json:
    data = {
        "type": "string",
        "description": "JSON, with its kind as type; last: response.completed",
    }
    return _post("Answer, in items", ResponsesRequest, _RESPONSE, _GENERATION_ERRORS, data)


def _kept_response() -> _Json:
    name = {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}
    deleting = _reading("Delete a response that is kept", _DELETED, 404, 503)
    return {
        "parameters": [name],
        **_reading("Show a response that is kept", _RESPONSE, 404, 503),
        "delete": deleting["get"],
    }


def _messages() -> _Json:
    data = {"type": "string", "description": "JSON, with its kind as type; last: message_stop"}
    summary = "Answer a chat, in Anthropic's format"
    return _post(
        summary, MessagesRequest, _MESSAGE, _GENERATION_ERRORS, data, error="MessagesError"
    )


def _posting(summary: str, request: type[BaseModel], answer: type) -> _Json:
    return _post(summary, request, _ref(answer.__name__), _GENERATION_ERRORS)


def _post(
    summary: str,
    request: type[BaseModel],
    answer: _Json,
    errors: Sequence[int],
    data: _Json | None = None,
    *,
    error: str = "Error",
) -> _Json:
    """``data``: of the events, where the answer may be a stream."""
    content: _Json = {"application/json": {"schema": answer}}
    if data is not None:
        event = {"type": "object", "required": ["data"], "properties": {"data": data}}
        content["text/event-stream"] = {"schema": event}
    body: _Json = {"application/json": {"schema": _ref(request.__name__)}}
    if request in EXAMPLES:
        body["application/json"]["examples"] = EXAMPLES[request]
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": body},
            "responses": {
                "200": {"description": "The answer", "content": content, "headers": _IGNORED},
                **_errors(*errors, schema=error),
            },
        }
    }


def _reading(summary: str, schema: _Json, *errors: int) -> _Json:
    content = {"application/json": {"schema": schema}}
    responses = {"200": {"description": "The answer", "content": content}, **_errors(*errors)}
    return {"get": {"summary": summary, "responses": responses}}


def _errors(*statuses: int, schema: str = "Error") -> _Json:
    return {str(status): _error(status, schema) for status in statuses}


def _error(status: int, schema: str) -> _Json:
    answer: _Json = {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": _ref(schema)}},
    }
    if status in (429, 503):
        seconds = {"description": "Seconds to wait", "schema": {"type": "integer"}}
        answer["headers"] = {"Retry-After": seconds}
    return answer


def _ref(name: str) -> _Json:
    return {"$ref": _PREFIX + name}


def _schemas() -> _Json:
    _, requests = models_json_schema(
        [(request, "validation") for request in _REQUESTS],
        ref_template=f"{_PREFIX}{{model}}",
    )
    answers = (
        *(api.Completion, api.ChatCompletion, api.ChatChunk, api.ModelList),
        *(EmbeddingList, Tokenized, Detokenized, TokenizerInfo, Version),
    )
    _, structs = msgspec.json.schema_components(answers, ref_template=f"{_PREFIX}{{name}}")
    return {"Error": _ERROR, "MessagesError": _MESSAGES_ERROR, **requests["$defs"], **structs}
