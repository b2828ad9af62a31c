"""A server of graphs that lies, and what can be done to a stream of one or to its files."""

import io
import random
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.proto.graphs.v1 import graphs_service_pb2_grpc as grpc_pb
from precast.rpc.server import Service, open_channel, start_server
from tests.support.artifacts import manifest_for, new_signer, signed

GOOD, STRANGER = new_signer(), new_signer()
GRAPH = random.Random(1).randbytes(8_000)
MANIFEST = manifest_for(GRAPH)
RAW, SIGNATURE = signed(MANIFEST, GOOD)
CHUNK = 1_000


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What a server sends."""

    manifest: bytes = RAW
    signature: bytes = SIGNATURE.signature
    signer: str = SIGNATURE.signer
    chunks: tuple[bytes, ...] = field(
        default_factory=lambda: tuple(GRAPH[i : i + CHUNK] for i in range(0, len(GRAPH), CHUNK))
    )
    header_at: int = 0
    """Place of the header among the parts; -1: none."""
    more: pb.FetchGraphResponse | None = None
    """A part that belongs to no stream, after the header and a chunk."""

    def parts(self) -> Iterator[pb.FetchGraphResponse]:
        header = pb.ArtifactHeader(
            manifest=self.manifest, signature=self.signature, signer=self.signer
        )
        parts = [pb.FetchGraphResponse(chunk=chunk) for chunk in self.chunks]
        if self.header_at >= 0:
            parts.insert(self.header_at, pb.FetchGraphResponse(header=header))
        if self.more is not None:
            parts.insert(2, self.more)
        yield from parts


class Liar(grpc_pb.GraphsServiceServicer):
    stream = Stream()

    async def FetchGraph(self, request: Any, context: Any) -> AsyncIterator[pb.FetchGraphResponse]:
        for part in self.stream.parts():
            yield part


@asynccontextmanager
async def liar() -> AsyncIterator[tuple[Liar, grpc_pb.GraphsServiceStub]]:
    servicer = Liar()
    service = Service(
        descriptor=pb.DESCRIPTOR.services_by_name["GraphsService"],
        servicer=servicer,
        add_to_server=grpc_pb.add_GraphsServiceServicer_to_server,
    )
    server = await start_server("127.0.0.1:0", [service])
    channel = open_channel(f"127.0.0.1:{server.port}")
    try:
        yield servicer, grpc_pb.GraphsServiceStub(channel)
    finally:
        await channel.close()
        await server.stop(0)


def flipped(raw: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(raw))
    return raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :]


def resigned(stream: Stream, **changes: Any) -> Stream:
    """A manifest changed and signed again by the trusted key: only its content can be wrong."""
    raw = msgspec.json.encode({**msgspec.to_builtins(MANIFEST), **changes}, order="deterministic")
    return replace(stream, manifest=raw, signature=GOOD.sign(raw).signature)


def _by_stranger(stream: Stream, rng: random.Random) -> Stream:
    signature = STRANGER.sign(stream.manifest)
    signer = rng.choice([signature.signer, SIGNATURE.signer])
    return replace(stream, signature=signature.signature, signer=signer)


def _flip_chunk(stream: Stream, rng: random.Random) -> Stream:
    place = rng.randrange(len(stream.chunks))
    chunks = list(stream.chunks)
    chunks[place] = flipped(chunks[place], rng)
    return replace(stream, chunks=tuple(chunks))


def _swap_chunks(stream: Stream, rng: random.Random) -> Stream:
    chunks = list(stream.chunks)
    a, b = rng.sample(range(len(chunks)), 2)
    chunks[a], chunks[b] = chunks[b], chunks[a]
    return replace(stream, chunks=tuple(chunks))


def _drop_chunk(stream: Stream, rng: random.Random) -> Stream:
    place = rng.randrange(len(stream.chunks))
    return replace(stream, chunks=stream.chunks[:place] + stream.chunks[place + 1 :])


def _other_factors(stream: Stream, rng: random.Random) -> Stream:
    other = manifest_for(GRAPH, num_tokens=str(rng.randrange(2, 100)))
    raw, signature = signed(other, GOOD)
    return replace(stream, manifest=raw, signature=signature.signature)


def _other_version(stream: Stream, rng: random.Random) -> Stream:
    """Right in itself, and not what was asked for."""
    raw, signature = signed(manifest_for(GRAPH, version=rng.randrange(2, 99)), GOOD)
    return replace(stream, manifest=raw, signature=signature.signature)


def _swapped_manifest(stream: Stream, rng: random.Random) -> Stream:
    """The manifest of another capture of the same graph, with its own signature."""
    raw, signature = signed(manifest_for(rng.randbytes(len(GRAPH))), GOOD)
    return replace(stream, manifest=raw, signature=signature.signature)


def _climbing_zip(stream: Stream, rng: random.Random) -> Stream:
    """A package whose members want to be unpacked elsewhere: whole, but a stranger's, or with the
    manifest of the right one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as package:
        for name in ("../../evil", "/tmp/evil", "model/../../../evil.so"):
            package.writestr(name, rng.randbytes(50))
    content = file.getvalue()
    raw, signature = signed(manifest_for(content), STRANGER)
    if rng.random() < 0.5:
        return replace(stream, chunks=(content,))
    return Stream(
        manifest=raw,
        signature=signature.signature,
        signer=rng.choice([signature.signer, SIGNATURE.signer]),
        chunks=(content,),
    )


def _repeat_chunk(stream: Stream, rng: random.Random) -> Stream:
    place = rng.randrange(len(stream.chunks))
    return replace(stream, chunks=(*stream.chunks[: place + 1], *stream.chunks[place:]))


def _foreign_part(stream: Stream, rng: random.Random) -> Stream:
    header = pb.ArtifactHeader(manifest=RAW, signature=stream.signature, signer=stream.signer)
    parts = (pb.FetchGraphResponse(), pb.FetchGraphResponse(header=header))
    return replace(stream, more=rng.choice(parts))


PATHS = ("../../evil", "/tmp/evil", "..", "", "a" * 31 + "/", "%2e%2e%2fevil", "\x00", "~/evil")
MUTATIONS: dict[str, Callable[[Stream, random.Random], Stream]] = {
    "manifest bit": lambda s, r: replace(s, manifest=flipped(s.manifest, r)),
    "manifest cut": lambda s, r: replace(s, manifest=s.manifest[: r.randrange(len(s.manifest))]),
    "manifest longer": lambda s, r: replace(s, manifest=s.manifest + r.randbytes(9)),
    "manifest noise": lambda s, r: replace(s, manifest=r.randbytes(300)),
    "signature bit": lambda s, r: replace(s, signature=flipped(s.signature, r)),
    "signature cut": lambda s, r: replace(s, signature=s.signature[: r.randrange(64)]),
    "unsigned": lambda s, r: replace(s, signature=b"", signer=r.choice(["", s.signer])),
    "signer": lambda s, r: replace(s, signer=r.choice([*PATHS, STRANGER.id])),
    "stranger": _by_stranger,
    "other version": _other_version,
    "swapped manifest": _swapped_manifest,
    "climbing zip": _climbing_zip,
    "chunk bit": _flip_chunk,
    "chunk repeated": _repeat_chunk,
    "foreign part": _foreign_part,
    "endless": lambda s, r: replace(s, chunks=(*s.chunks, *(r.randbytes(100_000),) * 30)),
    "chunks swapped": _swap_chunks,
    "chunk lost": _drop_chunk,
    "cut": lambda s, r: replace(s, chunks=(GRAPH[: r.randrange(len(GRAPH))],)),
    "longer": lambda s, r: replace(s, chunks=(*s.chunks, r.randbytes(r.randrange(1, 3000)))),
    "chunk first": lambda s, r: replace(s, header_at=r.randrange(1, 6)),
    "no header": lambda s, r: replace(s, header_at=-1),
    "nothing": lambda s, r: replace(s, header_at=-1, chunks=()),
    "signed: key is a path": lambda s, r: resigned(s, key=r.choice(PATHS)),
    "signed: key of another": lambda s, r: resigned(s, key=r.randbytes(16).hex()),
    "signed: other factors": _other_factors,
    "signed: version": lambda s, r: resigned(s, version=r.choice([0, -1, 2, "../1", 1e300])),
    "signed: size": lambda s, r: resigned(s, size=r.choice([0, 1, -5, 1 << 60, len(GRAPH) + 1])),
    "signed: digest": lambda s, r: resigned(
        s, digest=r.choice(["", "../x", r.randbytes(32).hex()])
    ),
    "signed: format": lambda s, r: resigned(s, format=r.choice([0, 2, "1", None])),
    "signed: extra field": lambda s, r: resigned(s, path=r.choice(PATHS)),
}


def everything_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _cut(path: Path, rng: random.Random) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw))])


def _link(path: Path, rng: random.Random) -> None:
    target = path.with_suffix(".moved")
    path.rename(target)
    path.symlink_to(target)


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "bit": lambda path, rng: void(path.write_bytes(flipped(path.read_bytes(), rng))),
    "cut": _cut,
    "longer": lambda path, rng: void(path.write_bytes(path.read_bytes() + rng.randbytes(8))),
    "noise": lambda path, rng: void(path.write_bytes(rng.randbytes(200))),
    "huge": lambda path, rng: void(path.write_bytes(bytes(1 << 20))),
    "missing": lambda path, rng: path.unlink(),
    "link": _link,
    "folder": _folder,
}


def void(_: object) -> None:
    return None
