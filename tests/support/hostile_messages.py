"""Calls of gRPC whose messages are damaged, or well formed and full of nonsense."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from google.protobuf.message import Message

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.graphs.v1 import graphs_service_pb2 as graphs
from tests.support.compile_worker import FACTORS
from tests.support.damage import damaged
from tests.support.hostile_bodies import PATTERNS, hostile_schema

_DECODE: Final = "/precast.decode.v1.DecodeService/"
_GRAPHS: Final = "/precast.graphs.v1.GraphsService/"
_NUMBERS: Final = (0, 1, 2, 31, 260, 2**16, 2**31 - 1, 2**32 - 1)
_FLOATS: Final = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
_TEXTS: Final = ("", "a", "tiny", "\x00", "é\U0001f600", "a" * 200, "%s", "../../x", "a" * 70_000)


@dataclass(frozen=True, kw_only=True)
class Call:
    method: str
    message: bytes
    streams: bool = False
    of_compiler: bool = False


def calls(rng: random.Random, model: str) -> Call:
    """One of them."""
    made = rng.choice((_generate, _generate, _of_decode, _of_graphs))(rng, model)
    if rng.random() < 0.3:
        return replace(made, message=damaged(rng, made.message, _noise))
    return made


def _generate(rng: random.Random, model: str) -> Call:
    start = pb.StartGeneration(model=model, prompt_token_ids=[1, 2, 3])
    start.stop.max_tokens = 2
    for _ in range(rng.randrange(4)):
        rng.choice(_CHANGES)(rng, start)
    request = pb.GenerateRequest(request_id=rng.choice(("r", *_TEXTS)), start=start)
    if rng.random() < 0.1:
        request.handle = rng.choice(_NUMBERS)
    return Call(method=_DECODE + "Generate", message=request.SerializeToString(), streams=True)


def _constrain(rng: random.Random, start: pb.StartGeneration) -> None:
    kind = rng.choice(("json_schema", "json_schema", "regex", "lark"))
    texts: dict[str, Sequence[str]] = {
        "json_schema": [json.dumps(hostile_schema(rng))],
        "regex": PATTERNS,
        "lark": ('start: "a"', "start: start", "", 'start: ("a"' * 300),
    }
    setattr(start.constraint, kind, rng.choice(texts[kind]))


def _spoil(rng: random.Random, message: Any) -> None:
    """A field of it, or of what is in it, gets a value that nobody expects."""
    descriptor = rng.choice(message.DESCRIPTOR.fields)
    if descriptor.is_repeated:
        _fill(rng, message, descriptor)
    elif descriptor.message_type is not None:
        inner = getattr(message, descriptor.name)
        inner.SetInParent()
        if inner.DESCRIPTOR.fields:
            _spoil(rng, inner)
    else:
        setattr(message, descriptor.name, _value(rng, descriptor))


def _fill(rng: random.Random, message: Any, descriptor: Any) -> None:
    """Some values, or very many."""
    field, count = getattr(message, descriptor.name), rng.choice((1, 3, 3000))
    entry = descriptor.message_type
    if entry is not None and entry.GetOptions().map_entry:
        key, value = entry.fields
        for _ in range(min(count, 100)):
            field[_value(rng, key)] = _value(rng, value)
    elif entry is None:
        field.extend([_value(rng, descriptor)] * count)


def _value(rng: random.Random, descriptor: Any) -> Any:
    kind = descriptor.cpp_type
    if kind in (descriptor.CPPTYPE_FLOAT, descriptor.CPPTYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if kind == descriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == descriptor.CPPTYPE_STRING:
        text = rng.choice(_TEXTS)
        return text.encode() if descriptor.type == descriptor.TYPE_BYTES else text
    number = rng.choice(_NUMBERS)
    signed = kind in (descriptor.CPPTYPE_INT32, descriptor.CPPTYPE_ENUM)
    return number if not signed else min(number, 2**31 - 1) * rng.choice((1, -1))


_CHANGES: Final = (_constrain, _constrain, _spoil, _spoil, _spoil)


def _of_decode(rng: random.Random, _model: str) -> Call:
    """Not Drain: it does what it is told."""
    request, name = rng.choice(
        (
            (pb.AbortRequest(), "Abort"),
            (pb.GetStatusRequest(), "GetStatus"),
            (pb.GetGraphSpecsRequest(), "GetGraphSpecs"),
            (pb.GetStatusRequest(), "NoSuchMethod"),
        )
    )
    return Call(method=_DECODE + name, message=_spoilt(rng, request))


def _of_graphs(rng: random.Random, _model: str) -> Call:
    factors = {**FACTORS, rng.choice(list(FACTORS)): rng.choice(_TEXTS)}
    spec = graphs.GraphSpec(factors=factors)
    request, name = rng.choice(
        (
            (graphs.RequestGraphsRequest(specs=[spec] * rng.choice((1, 30))), "RequestGraphs"),
            (graphs.ListGraphsRequest(), "ListGraphs"),
            (graphs.ExplainGraphRequest(), "ExplainGraph"),
            (graphs.ReportCrashRequest(), "ReportCrash"),
            (graphs.ReportCanaryRequest(), "ReportCanary"),
        )
    )
    message = _spoilt(rng, request)
    return Call(method=_GRAPHS + name, message=message, of_compiler=True)


def _spoilt(rng: random.Random, request: Message) -> bytes:
    for _ in range(rng.randrange(3)):
        if request.DESCRIPTOR.fields:
            _spoil(rng, request)
    return request.SerializeToString()


def _noise(rng: random.Random, _data: bytes, _at: int) -> bytes:
    return rng.randbytes(rng.randrange(200))
