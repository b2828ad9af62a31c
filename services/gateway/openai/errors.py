"""Whatever goes wrong, in the shape that OpenAI's clients expect.

``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`` with a fitting status, or as
one SSE event once a stream has begun. Under ``/v1/messages`` it is
``{"type": "error", "error": {"type": ..., "message": ...}}``, as Anthropic's clients have it.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from precast import errors
from precast.errors import PrecastError
from services.gateway.status_watch import CLIENT_GONE

RETRY_AFTER_S: Final = 1
"""What overloaded and unavailable answers tell clients to wait."""
MESSAGES: Final = "/v1/messages"
"""Where Anthropic's clients ask."""
_ANTHROPIC: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What they call errors; others are api_error or invalid_request_error."""
_MAX_TEXT: Final = 1000
"""Characters of a message that are shown."""


class ApiError(Exception):
    """An error answer. Raised by the gateway's own checks; other errors are turned into it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        detail = {
            "message": _encodable(self.message),
            "type": self.kind,
            "param": None if self.param is None else _encodable(self.param),
            "code": self.code,
        }
        return {"error": detail}

    def body_at(self, path: str) -> dict[str, Any]:
        """The error object as the clients of the path expect it."""
        return self.anthropic_body() if path.startswith(MESSAGES) else self.body()

    def anthropic_body(self) -> dict[str, Any]:
        kind = _ANTHROPIC.get(self.status, "api_error" if self.status >= 500 else self.kind)
        message = _encodable(self.message)
        return {"type": "error", "error": {"type": kind, "message": message}}

    def response(self, path: str = "") -> JSONResponse:
        """``path``: of the request."""
        return JSONResponse(self.body_at(path), status_code=self.status, headers=self.headers)


def _encodable(text: str) -> str:
    """Errors quote what clients sent: halves of characters, and text of any length."""
    shown = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
    return shown.encode(errors="replace").decode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The caller's mistake."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str) -> ApiError:
    message = f"The model {model!r} does not exist."
    return ApiError(404, message, param="model", code="model_not_found")


def context_length_exceeded(limit: int, prompt: int, completion: int, param: str) -> ApiError:
    """``prompt`` and ``completion`` tokens don't fit into ``limit``."""
    asked = (
        f"you requested {prompt + completion} tokens "
        f"({prompt} in the prompt, {completion} for the completion)"
    )
    message = f"This model's maximum context length is {limit} tokens, but {asked}."
    return invalid(message, param=param, code="context_length_exceeded")


def unavailable(message: str, code: str) -> ApiError:
    """Nothing can serve the request now."""
    return _retryable(503, message, "server_error", code)


def overloaded(message: str) -> ApiError:
    return _retryable(429, message, "rate_limit_error", "overloaded")


def timed_out(limit_s: float) -> ApiError:
    message = f"The request took longer than {limit_s:g} s."
    return ApiError(504, message, kind="server_error", code="timeout")


def internal(message: str = "The server had an error while processing the request.") -> ApiError:
    return ApiError(500, message, kind="server_error", code="internal_error")


def _retryable(status: int, message: str, kind: str, code: str) -> ApiError:
    headers = {"retry-after": str(RETRY_AFTER_S)}
    return ApiError(status, message, kind=kind, code=code, headers=headers)


def from_precast(error: PrecastError) -> ApiError:
    """The answer that stands for an error of ours, a worker's included."""
    message = str(error)
    match error:
        case errors.ContextLengthExceeded():
            return invalid(message, code="context_length_exceeded")
        case errors.InvalidRequest():
            return invalid(message)
        case errors.ModelNotFound():
            return ApiError(404, message, param="model", code="model_not_found")
        case errors.Overloaded():
            return overloaded(message)
        case errors.WorkerUnavailable():
            return unavailable(message, "worker_unavailable")
        case errors.Unavailable():
            return unavailable(message, "unavailable")
        case errors.DeadlineExceeded():
            return ApiError(504, message, kind="server_error", code="timeout")
        case _:
            return internal(message)


def from_any(error: Exception) -> ApiError:
    """The answer to any exception; what is unexpected doesn't show its text to the client."""
    if isinstance(error, ApiError):
        return error
    return from_precast(error) if isinstance(error, PrecastError) else internal()


async def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    return from_any(error).response(request.scope["path"])


async def _on_disconnect(_: Request, error: Exception) -> Response:
    """The client left while it sent its body: nobody reads this."""
    return Response(status_code=CLIENT_GONE)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    """Unknown routes and methods, and what the framework itself refuses."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    messages = {
        404: f"Invalid URL ({request.method} {request.url.path}).",
        405: f"Method {request.method} is not allowed for {request.url.path}.",
    }
    message = messages.get(status, str(error.detail) or HTTPStatus(status).phrase)
    kind = "invalid_request_error" if status < 500 else "server_error"
    answer = ApiError(status, message, kind=kind, headers=error.headers)
    return answer.response(request.scope["path"])


def install(app: FastAPI) -> None:
    """Make every error of the app an OpenAI error."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(PrecastError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_api_error)
