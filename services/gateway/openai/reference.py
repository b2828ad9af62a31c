"""The OpenAPI document: what the server does, no more and no less.

Schemas of requests come from their models, those of answers from their structs. The paths are
written here, because the framework would promise answers that are never sent.
"""

from http import HTTPStatus
from typing import Any, Final

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.gateway.openai import responses as api
from services.gateway.openai.schemas import ChatRequest, CompletionRequest

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
        "workers": {"type": "integer", "minimum": 1},
        "models": {"type": "array", "items": {"type": "string"}},
    },
}
_GENERATION_ERRORS: Final = (400, 404, 408, 413, 415, 429, 500, 503, 504)


def document() -> _Json:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Precast", "version": "1", "description": "An OpenAI-compatible API."},
        "paths": _paths(),
        "components": {"schemas": _schemas()},
    }


def _paths() -> _Json:
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "/v1/completions": _generation("Complete texts", CompletionRequest, api.Completion),
        "/v1/chat/completions": _generation(
            "Answer a chat", ChatRequest, api.ChatCompletion, api.ChatChunk
        ),
        "/v1/models": _reading("List the models that are served", _ref("ModelList")),
        "/v1/models/{model}": {
            "parameters": [name],
            **_reading("Describe one model", _ref("Model"), 404),
        },
        "/health": _reading("Whether the process answers", _HEALTH),
        "/ready": _reading("Whether a worker is ready", _READY, 503),
    }


def _generation(
    summary: str, request: type[BaseModel], whole: type, chunk: type | None = None
) -> _Json:
    data = {"type": "string", "description": f"JSON: {(chunk or whole).__name__}; last: [DONE]"}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    content = {
        "application/json": {"schema": _ref(whole.__name__)},
        "text/event-stream": {"schema": event},
    }
    body = {"application/json": {"schema": _ref(request.__name__)}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": body},
            "responses": {
                "200": {"description": "The answer", "content": content},
                **_errors(*_GENERATION_ERRORS),
            },
        }
    }


def _reading(summary: str, schema: _Json, *errors: int) -> _Json:
    content = {"application/json": {"schema": schema}}
    responses = {"200": {"description": "The answer", "content": content}, **_errors(*errors)}
    return {"get": {"summary": summary, "responses": responses}}


def _errors(*statuses: int) -> _Json:
    return {str(status): _error(status) for status in statuses}


def _error(status: int) -> _Json:
    answer: _Json = {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    if status in (429, 503):
        seconds = {"description": "Seconds to wait", "schema": {"type": "integer"}}
        answer["headers"] = {"Retry-After": seconds}
    return answer


def _ref(name: str) -> _Json:
    return {"$ref": _PREFIX + name}


def _schemas() -> _Json:
    _, requests = models_json_schema(
        [(CompletionRequest, "validation"), (ChatRequest, "validation")],
        ref_template=f"{_PREFIX}{{model}}",
    )
    answers = (api.Completion, api.ChatCompletion, api.ChatChunk, api.ModelList)
    _, structs = msgspec.json.schema_components(answers, ref_template=f"{_PREFIX}{{name}}")
    return {"Error": _ERROR, **requests["$defs"], **structs}
