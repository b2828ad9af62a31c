"""Vectors as OpenAI's JSON."""

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Final

from msgspec import Raw, Struct

from precast.errors import Unavailable
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai.embeddings.fields import EmbeddingRequest
from services.gateway.openai.errors import ApiError
from services.gateway.openai.events import TextEvents
from services.gateway.openai.formats import Choice
from services.gateway.openai.plan import Plan
from services.gateway.openai.responses import Usage, encode
from services.gateway.routing.event_queue import Delta


class Vector(Struct, frozen=True, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or little-endian float32 in base64."""


class EmbeddingUsage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class _Encoded(Struct, frozen=True, kw_only=True):
    """An ``EmbeddingList`` whose vectors are JSON already."""

    object: str = "list"
    data: list[Raw]
    model: str
    usage: EmbeddingUsage


class EmbeddingList(Struct, frozen=True, kw_only=True):
    """What is answered."""

    object: str = "list"
    data: list[Vector]
    model: str
    usage: EmbeddingUsage


class EmbeddingFormat:
    """The answer to one request, which has no stream."""

    text_events: Final[tuple[TextEvents, ...]] = ()

    def __init__(self, plan: Plan) -> None:
        assert isinstance(plan.origin, EmbeddingRequest), "it is planned from one"
        self._plan = plan
        self._as_text = plan.origin.encoding_format == "base64"

    def opening(self, index: int) -> bytes:
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        return b""

    def closing(self, index: int, finished: pb.GenerationFinished) -> bytes:
        return b""

    def ending(self, usage: Usage) -> bytes:
        return b""

    def failure(self, error: ApiError) -> bytes:
        return b""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Struct:
        used = usage.prompt_tokens
        return _Encoded(
            data=[self._vector(index, choice) for index, choice in enumerate(choices)],
            model=self._plan.model,
            usage=EmbeddingUsage(prompt_tokens=used, total_tokens=used),
        )

    def _vector(self, index: int, choice: Choice) -> Raw:
        """One at a time: the numbers of thousands as Python's would be hundreds of megabytes."""
        data = b"" if choice.finished is None else choice.finished.embedding
        if not data:
            raise Unavailable("the worker is of a version that makes no embeddings")
        shown = base64.b64encode(data).decode() if self._as_text else _numbers(data)
        return Raw(encode(Vector(index=index, embedding=shown)))


def _numbers(data: bytes) -> list[float]:
    values = array("f", data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
