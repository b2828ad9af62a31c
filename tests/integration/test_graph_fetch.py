"""Fetching over gRPC from a server that lies, and reading a cache that was tampered with.

Whatever is done to an artifact, its manifest, its signature or the stream: it is refused with a
reason, and nothing is written outside the cache or left in it.
"""

import random
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from precast.errors import ArtifactRejected, GraphNotFound, PrecastError
from precast.graphs.disk_store import DiskStore
from precast.graphs.fetch import GraphCache, fetch_graph
from precast.graphs.v1 import graphs_service_pb2 as pb
from precast.graphs.v1 import graphs_service_pb2_grpc as grpc_pb
from precast.rpc import Service, open_channel, start_server
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed, trust
from tests.support.compile_worker import FACTORS

GOOD, STRANGER = new_signer(), new_signer()
GRAPH = random.Random(1).randbytes(40_000)
MANIFEST = manifest_for(GRAPH)
RAW, SIGNATURE = signed(MANIFEST, GOOD)
CHUNK = 8_000


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

    def parts(self) -> Iterator[pb.FetchGraphResponse]:
        header = pb.ArtifactHeader(
            manifest=self.manifest, signature=self.signature, signer=self.signer
        )
        parts = [pb.FetchGraphResponse(chunk=chunk) for chunk in self.chunks]
        if self.header_at >= 0:
            parts.insert(self.header_at, pb.FetchGraphResponse(header=header))
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
    other = manifest_for(GRAPH, batch_size=str(rng.randrange(2, 100)))
    raw, signature = signed(other, GOOD)
    return replace(stream, manifest=raw, signature=signature.signature)


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
    "chunk bit": _flip_chunk,
    "chunks swapped": _swap_chunks,
    "chunk lost": _drop_chunk,
    "cut": lambda s, r: replace(s, chunks=(GRAPH[: r.randrange(len(GRAPH))],)),
    "longer": lambda s, r: replace(s, chunks=(*s.chunks, r.randbytes(r.randrange(1, 9000)))),
    "chunk first": lambda s, r: replace(s, header_at=r.randrange(1, 6)),
    "no header": lambda s, r: replace(s, header_at=-1),
    "nothing": lambda s, r: replace(s, header_at=-1, chunks=()),
    "signed: key is a path": lambda s, r: resigned(s, key=r.choice(PATHS)),
    "signed: key of another": lambda s, r: resigned(s, key=r.randbytes(16).hex()),
    "signed: other factors": _other_factors,
    "signed: generation": lambda s, r: resigned(s, generation=r.choice([0, -1, 2, "../1", 1e300])),
    "signed: size": lambda s, r: resigned(s, size=r.choice([0, 1, -5, 1 << 60, len(GRAPH) + 1])),
    "signed: digest": lambda s, r: resigned(
        s, digest=r.choice(["", "../x", r.randbytes(32).hex()])
    ),
    "signed: format": lambda s, r: resigned(s, format=r.choice([0, 2, "1", None])),
    "signed: extra field": lambda s, r: resigned(s, path=r.choice(PATHS)),
}


def everything_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.asyncio
async def test_good_stream_is_kept(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path, trust(GOOD))
    async with liar() as (_, stub):
        for _ in range(2):  # the second time it is there already
            fetched = await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, generation=1)
            assert fetched.graph_path.read_bytes() == GRAPH
    assert cache.find(FACTORS) == fetched
    assert GraphCache(tmp_path, trust(GOOD)).find(FACTORS) == fetched


@pytest.mark.asyncio
async def test_no_tampered_stream_is_accepted(tmp_path: Path) -> None:
    root = tmp_path / "home" / "cache"
    cache = GraphCache(root, trust(GOOD))
    rng = random.Random(20_261_123)
    reasons: dict[str, set[str]] = {}
    async with liar() as (servicer, stub):
        for number in range(12 * len(MUTATIONS)):
            name = list(MUTATIONS)[number % len(MUTATIONS)]
            servicer.stream = MUTATIONS[name](Stream(), rng)
            with pytest.raises(ArtifactRejected) as refusal:
                await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, generation=1)
            reasons.setdefault(name, set()).add(str(refusal.value))
            assert everything_under(tmp_path) == [], name
    assert sum(map(len, reasons.values())) >= len(MUTATIONS) == len(reasons)
    assert all(len(reason) >= len("not signed") for found in reasons.values() for reason in found)
    assert cache.find(FACTORS) is None


@pytest.mark.asyncio
async def test_server_error_keeps_its_meaning(tmp_path: Path) -> None:
    class Empty(grpc_pb.GraphsServiceServicer):
        async def FetchGraph(self, request: Any, context: Any) -> AsyncIterator[Any]:
            raise GraphNotFound("no graph here")
            yield

    cache = GraphCache(tmp_path, trust(GOOD))
    service = Service(
        descriptor=pb.DESCRIPTOR.services_by_name["GraphsService"],
        servicer=Empty(),
        add_to_server=grpc_pb.add_GraphsServiceServicer_to_server,
    )
    server = await start_server("127.0.0.1:0", [service])
    channel = open_channel(f"127.0.0.1:{server.port}")
    stub = grpc_pb.GraphsServiceStub(channel)
    with pytest.raises(GraphNotFound, match="no graph here"):
        await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS)
    await server.stop(0)
    with pytest.raises(PrecastError):
        await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, timeout_s=2)
    await channel.close()


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


@pytest.mark.parametrize("name", ["graph.pt2", "manifest.json", "manifest.sig"])
def test_no_damaged_cache_entry_is_used(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    for number in range(6 * len(DAMAGES)):
        root = tmp_path / str(number)
        cache = GraphCache(root, trust(GOOD))
        made = graph_file(tmp_path, seed=number, size=5000)
        manifest = manifest_for(made.read_bytes())
        artifact = cache.add(*signed(manifest, GOOD), made)
        damage = list(DAMAGES)[number % len(DAMAGES)]
        DAMAGES[damage](artifact.graph_path.with_name(name), rng)
        assert cache.find(FACTORS) is None, (name, damage)
        shutil.rmtree(root)


def test_cache_falls_back_to_an_older_good_generation(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD))
    artifacts = []
    for generation in (1, 2):
        made = graph_file(tmp_path, seed=generation)
        manifest = manifest_for(made.read_bytes(), generation=generation)
        artifacts.append(cache.add(*signed(manifest, GOOD), made))
    assert cache.find(FACTORS) == artifacts[1]
    artifacts[1].graph_path.write_bytes(b"damaged")
    assert cache.find(FACTORS) == artifacts[0]


def test_revoked_key_empties_the_cache(tmp_path: Path) -> None:
    made = graph_file(tmp_path)
    manifest = manifest_for(made.read_bytes())
    GraphCache(tmp_path / "cache", trust(GOOD)).add(*signed(manifest, GOOD), made)
    assert GraphCache(tmp_path / "cache", trust(STRANGER)).find(FACTORS) is None


def test_other_bytes_under_a_cached_number_replace_it(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD))
    for seed in (1, 2):
        made = graph_file(tmp_path, seed=seed)
        artifact = cache.add(*signed(manifest_for(made.read_bytes()), GOOD), made)
        assert artifact.graph_path.read_bytes() == made.read_bytes()


def test_cache_is_bounded_and_forgets_what_was_not_used(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD), max_bytes=350_000)
    specs = []
    for number in range(5):
        made = graph_file(tmp_path, seed=number)
        manifest = manifest_for(made.read_bytes(), batch_size=str(number + 1))
        cache.add(*signed(manifest, GOOD), made)
        specs.append({**FACTORS, "batch_size": str(number + 1)})
        assert cache.find(specs[0]) is not None, "what is used stays"
    assert [cache.find(spec) is not None for spec in specs] == [True, False, False, True, True]


def test_few_generations_are_kept_and_always_the_one_just_fetched(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD))
    for generation in (5, 6, 7, 1):  # 1: the store was emptied and has begun anew
        made = graph_file(tmp_path, seed=generation)
        manifest = manifest_for(made.read_bytes(), generation=generation)
        assert cache.add(*signed(manifest, GOOD), made).manifest == manifest
    assert DiskStore(tmp_path / "cache").generations(MANIFEST.key) == [1, 6, 7]
