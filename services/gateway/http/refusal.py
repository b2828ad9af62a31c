"""Answers of whoever never gets to read a request."""

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from services.gateway.openai.errors import ApiError


def refusal(status: int, message: str) -> bytes:
    """A whole answer, after which the connection is closed."""
    answer = ApiError(status, message, headers={"connection": "close"}).response()
    lines = [STATUS_LINE[status].rstrip()]
    lines += [b"%s: %s" % header for header in answer.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])
