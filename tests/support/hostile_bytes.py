"""What comes over a connection from somebody who means no good: HTTP/1, HTTP/2, or neither."""

import random
from collections.abc import Callable, Sequence
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
_END_HEADERS: Final = 4
GENERATE: Final = "/precast.decode.v1.DecodeService/Generate"
_MANY: Final = 500


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    return _frame(len(payload), kind, payload, flags, stream)


def _frame(length: int, kind: int, payload: bytes, flags: int, stream: int) -> bytes:
    head = bytes((kind, flags)) + stream.to_bytes(4, "big")
    return (length & 0xFFFFFF).to_bytes(3, "big") + head + payload


def call_headers(path: str = GENERATE, **more: str) -> bytes:
    """A block of headers as gRPC's, each spelled out."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "a"}
    fields |= {"te": "trailers", "content-type": "application/grpc", **more}
    return b"".join(
        b"\x00" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()
        for name, value in fields.items()
    )


def _begun(*frames: bytes) -> bytes:
    """A connection, a call, and what follows."""
    opened = frame(HEADERS, call_headers(), flags=_END_HEADERS, stream=1)
    return b"".join((PREFACE, frame(SETTINGS), opened, *frames))


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 9, 50, 2000)))


def _wild_frames(rng: random.Random) -> bytes:
    """Any kind, flags, stream and length, some of them wrong."""
    parts = []
    for _ in range(rng.randrange(1, 12)):
        payload = rng.randbytes(rng.choice((0, 4, 5, 8, 40, 300)))
        length = len(payload) if rng.random() < 0.8 else rng.choice((0, 1, 2**24 - 1, 70_000))
        stream = rng.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1))
        parts.append(_frame(length, rng.randrange(14), payload, rng.randrange(256), stream))
    return PREFACE + frame(SETTINGS) + b"".join(parts)


def _lying_message(rng: random.Random) -> bytes:
    """A call whose message says that it has another length, or that it is compressed."""
    body = rng.randbytes(rng.randrange(40))
    length = rng.choice((0, 1, len(body), len(body) + 5, 2**31, 2**32 - 1))
    message = bytes((rng.choice((0, 1, 2, 255)),)) + length.to_bytes(4, "big") + body
    return _begun(frame(DATA, message, flags=rng.randrange(2), stream=1))


def _header_block(rng: random.Random) -> bytes:
    """Blocks that don't end, refer to nothing, or grow when they are read."""
    block = rng.choice(
        (
            b"\xff" * 40,
            b"\x80" * 300,
            b"\x3f" + b"\xff" * 12,
            b"\x40\x01a\x7f\x80\x7f" + b"b" * 4000 + b"\xbe" * 4000,
            call_headers(**{"a" * 60: "b" * 100}) * 60,
            call_headers(path="/../../x"),
            call_headers(path="\x00"),
            call_headers(**{"grpc-timeout": "99999999999H"}),
            call_headers(**{"grpc-encoding": "gzip"}),
            call_headers(traceparent="00-zz"),
            rng.randbytes(200),
        )
    )
    pieces = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    first, rest = frame(HEADERS, pieces[0], flags=rng.choice((0, 4, 5)), stream=1), pieces[1:]
    return PREFACE + frame(SETTINGS) + first + b"".join(frame(CONTINUATION, p) for p in rest)


def _flood(rng: random.Random) -> bytes:
    """Many frames that cost the sender nothing."""
    opened = [
        frame(HEADERS, call_headers(), flags=_END_HEADERS, stream=2 * n + 1)
        + frame(RST_STREAM, (8).to_bytes(4, "big"), stream=2 * n + 1)
        for n in range(_MANY)
    ]
    return _begun(
        rng.choice(
            (
                frame(PING, bytes(8)) * _MANY,
                frame(SETTINGS, b"\x00\x04\x7f\xff\xff\xff") * _MANY,
                frame(WINDOW, (2**31 - 1).to_bytes(4, "big")) * _MANY,
                frame(WINDOW, bytes(4), stream=1) * _MANY,
                frame(DATA, stream=1) * _MANY,
                frame(CONTINUATION, stream=1) * _MANY,
                frame(PRIORITY, bytes(5), stream=3) * _MANY,
                frame(GOAWAY, bytes(8)) * _MANY,
                b"".join(opened[1:]),
                frame(SETTINGS, b"\x00\x03\x00\x00\x00\x00\x00\x05\xff\xff\xff\xff"),
            )
        )
    )


def _other_protocol(rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300),
            b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"SSH-2.0-x\r\n",
            PREFACE[: rng.randrange(len(PREFACE))],
            PREFACE + PREFACE,
        )
    )


def _cut(rng: random.Random) -> bytes:
    whole = rng.choice((_wild_frames, _lying_message, _header_block))(rng)
    return whole[: rng.randrange(len(whole))]


_HTTP2: Final[Sequence[Callable[[random.Random], bytes]]] = (
    *(_noise, _wild_frames, _wild_frames, _lying_message, _lying_message, _header_block),
    *(_flood, _other_protocol, _cut),
)


def http2_bytes(rng: random.Random) -> bytes:
    return rng.choice(_HTTP2)(rng)


_GOOD: Final = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
_LINES: Final = (
    *(b"content-length: -1", b"content-length: 99999999999999999999", b"content-length: 1, 2"),
    *(b"content-length: 5\r\ncontent-length: 6", b"content-length: 0x10", b"content-length:"),
    *(b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"te: chunked"),
    *(b"transfer-encoding: chunked\r\ncontent-length: 4", b"transfer-encoding: xchunked"),
    *(b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk", b": a"),
    *(b"upgrade: websocket\r\nconnection: upgrade", b"connection: close, keep-alive", b"a b: c"),
    *(b"x: \x00", b"x: " + b"a" * 70_000, b"expect: 100-continue", b"expect: what", b" folded"),
    *(
        b"authorization: Bearer \xff\xfe",
        b"host: a\r\nhost: b",
        b"content-encoding: gzip",
        b"\xff: a",
    ),
    *(b"x-request-id: " + b"\xe9" * 500, b"content-type: application/json; charset=\xff"),
    *(b"traceparent: 00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-zz", b"accept: " + b"*," * 3000),
)
_STARTS: Final = (
    *(b"POST /v1/completions HTTP/1.1", b"POST /v1/chat/completions HTTP/1.0"),
    *(b"GET /v1/models HTTP/1.1", b"GET http://a/health HTTP/1.1", b"OPTIONS * HTTP/1.1"),
    *(b"CONNECT a:1 HTTP/1.1", b"POST /v1/completions HTTP/9.9", b"POST /v1/completions"),
    *(b"\x00 / HTTP/1.1", b"GET /%00%ff%zz HTTP/1.1", b"GET /" + b"a" * 70_000 + b" HTTP/1.1"),
    *(b"GET /../../etc/passwd HTTP/1.1", b"PATCH /v1/models/%2e%2e HTTP/1.1", b"TRACE / HTTP/1.1"),
    *(b"GET /v1/responses/" + b"%F0%9F" * 50 + b" HTTP/1.1", b"POST /v1/completions?\xff HTTP/1.1"),
)
_BODIES: Final = (
    *(b"", _GOOD, b"5\r\nabcde\r\n0\r\n\r\n", b"zz\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n"),
    *(b"1;" + b"a" * 9000 + b"\r\n{\r\n0\r\n\r\n", b"0\r\n" + b"t: a\r\n" * 500 + b"\r\n"),
)


def _request(rng: random.Random) -> bytes:
    lines = [rng.choice(_STARTS), b"host: a", b"content-type: application/json"]
    lines += rng.choices(_LINES, k=rng.randrange(3))
    if rng.random() < 0.5:
        lines.append(b"content-length: %d" % rng.choice((len(_GOOD), 0, 3, 10_000)))
    end = rng.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"))
    return end.join([*lines, b"", rng.choice(_BODIES)])


def http_bytes(rng: random.Random) -> bytes:
    """One request or several on a connection, damaged or cut off."""
    data = b"".join(_request(rng) for _ in range(rng.choice((1, 1, 1, 3))))
    match rng.randrange(6):
        case 0:
            return data[: rng.randrange(len(data))]
        case 1:
            spoilt = bytearray(data)
            spoilt[rng.randrange(min(len(data), 200))] = rng.randrange(256)
            return bytes(spoilt)
        case 2:
            return _noise(rng) + data
    return data
