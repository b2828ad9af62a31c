"""More than a thousand artifacts, streams and bundles that somebody has tampered with.

They go through the code that workers run: a stream over gRPC into a cache, a cache and a store on
disk, a store through a compile worker's service, a bundle into a store and a cache. None gets
anywhere, each is refused with a reason, and nothing is written or left where it doesn't belong.
"""

import io
import random
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from precast.errors import ArtifactRejected, ConfigError, GraphNotFound, PrecastError
from precast.fleet.leases import Registry
from precast.fleet.queue.queue import CaptureQueue
from precast.graphs.artifacts.bundle import write_bundle
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.artifacts.fetch import fetch_graph
from precast.graphs.artifacts.signing import Signature
from precast.graphs.artifacts.transfer import (
    import_into_cache,
    import_into_store,
    serving_artifacts,
)
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.proto.graphs.v1 import graphs_service_pb2_grpc as grpc_pb
from precast.rpc.server import Service, open_channel, start_server
from services.compile_worker.catalog.index import GraphIndex
from services.compile_worker.catalog.versions import Versions
from services.compile_worker.graphs import Graphs
from services.compile_worker.grpc_server import GraphsServicer
from services.compile_worker.metrics import Metrics
from services.compile_worker.rollout.canary import Canaries, CanaryPolicy
from tests.support.artifacts import graph_file, manifest_for, signed, trust
from tests.support.compile_worker import BUILD, FACTORS
from tests.support.hostile import (
    DAMAGES,
    GOOD,
    MANIFEST,
    MUTATIONS,
    PATHS,
    STRANGER,
    Stream,
    flipped,
    liar,
)
from tests.support.hostile_bundles import TRICKS

STREAMS, CACHED, STORED, BUNDLES = 512, 192, 192, 256
"""Cases of each kind: 1152 in all."""
FILES = ("graph.pt2", "manifest.json", "manifest.sig")
TRUSTED = trust(GOOD)


def everything_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_there_are_a_thousand() -> None:
    assert STREAMS + CACHED + STORED + BUNDLES >= 1000


@pytest.mark.asyncio
async def test_no_tampered_stream_is_accepted(tmp_path: Path) -> None:
    root = tmp_path / "home" / "cache"
    cache = GraphCache(root, TRUSTED)
    rng = random.Random(20_261_123)
    reasons: dict[str, set[str]] = {}
    async with liar() as (servicer, stub):
        for number in range(STREAMS):
            name = list(MUTATIONS)[number % len(MUTATIONS)]
            servicer.stream = MUTATIONS[name](Stream(), rng)
            key = rng.choice((MANIFEST.key, *PATHS)) if name == "stranger" else MANIFEST.key
            with pytest.raises(ArtifactRejected) as refusal:
                await fetch_graph(stub, cache, key, spec=FACTORS, version=1)
            reasons.setdefault(name, set()).add(str(refusal.value))
            assert everything_under(tmp_path) == [], name
        servicer.stream = Stream()
        for key in PATHS:
            with pytest.raises(ArtifactRejected, match="asked for"):
                await fetch_graph(stub, cache, key, spec=FACTORS, version=1)
        assert everything_under(tmp_path) == []
        await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, version=1)
    assert sum(map(len, reasons.values())) >= len(MUTATIONS) == len(reasons)
    assert all(len(reason) >= len("not signed") for found in reasons.values() for reason in found)


def _stranger_signs(folder: Path, rng: random.Random) -> None:
    raw = (folder / "manifest.json").read_bytes()
    signature = STRANGER.sign(raw)
    name = rng.choice([STRANGER.id, GOOD.id])
    sig = Signature(signer=name, signature=signature.signature)
    (folder / "manifest.sig").write_bytes(sig.encode())


def _stranger_replaces(folder: Path, rng: random.Random) -> None:
    """All three files agree with each other; a stranger has made them."""
    content = rng.randbytes(3000)
    raw, signature = signed(manifest_for(content), STRANGER)
    for name, written in zip(FILES, (content, raw, signature.encode()), strict=True):
        (folder / name).write_bytes(written)


def _unsigned(folder: Path, rng: random.Random) -> None:
    (folder / "manifest.sig").write_bytes(rng.choice([b"unsigned\n", b"unsigned"]))


def _swapped(folder: Path, rng: random.Random) -> None:
    """Manifest and signature of another good artifact."""
    other = manifest_for(rng.randbytes(5000), num_tokens=str(rng.randrange(1, 9)))
    raw, signature = signed(other, GOOD)
    (folder / "manifest.json").write_bytes(raw)
    (folder / "manifest.sig").write_bytes(signature.encode())


def _linked_away(folder: Path, rng: random.Random) -> None:
    """The artifact itself, but elsewhere: its version or its key is a link."""
    place = rng.choice([folder, folder.parent])
    outside = folder.parents[2] / "outside"
    shutil.move(place, outside)
    place.symlink_to(outside)


WHOLE: dict[str, Callable[[Path, random.Random], None]] = {
    "stranger signs": _stranger_signs,
    "stranger replaces": _stranger_replaces,
    "unsigned": _unsigned,
    "swapped": _swapped,
    "linked away": _linked_away,
}


@dataclass(frozen=True, kw_only=True)
class Damaged:
    name: str
    root: Path


def damaged(folder: Path, count: int) -> Iterator[Damaged]:
    """Folders of one artifact each, every one with another damage."""
    rng = random.Random(count)
    made = graph_file(folder, size=5000)
    raw, signature = signed(manifest_for(made.read_bytes()), GOOD)
    parts = [(f"{file} {kind}", file, kind) for file in FILES for kind in DAMAGES]
    for number in range(count):
        root = folder / str(number) / "root"
        DiskStore(root).publish(raw, signature, made)
        artifact = root / MANIFEST.key / "1"
        name, file, kind = parts[number % len(parts)]
        if number % 3 == 2:
            name = list(WHOLE)[number % len(WHOLE)]
            WHOLE[name](artifact, rng)
        else:
            DAMAGES[kind](artifact / file, rng)
        yield Damaged(name=name, root=root)
        shutil.rmtree(root.parent)


def test_no_damaged_cache_entry_is_used(tmp_path: Path) -> None:
    for case in damaged(tmp_path, CACHED):
        cache = GraphCache(case.root, TRUSTED)
        with pytest.raises((ArtifactRejected, GraphNotFound)) as refusal:
            cache.open(MANIFEST.key, 1, FACTORS)
        assert str(refusal.value), case.name
        assert cache.find(FACTORS) is None, case.name
        assert GraphCache(case.root, TRUSTED).find(FACTORS) is None, case.name


@asynccontextmanager
async def compile_service(
    root: Path, registry: Registry
) -> AsyncIterator[grpc_pb.GraphsServiceStub]:
    """A compile worker's service over a store, in this process."""
    store, index = DiskStore(root), GraphIndex(registry.redis)
    versions = Versions(store=store, index=index, trusted=TRUSTED)
    graphs = Graphs(
        store=store,
        index=index,
        queue=CaptureQueue(registry.redis, "hostile"),
        versions=versions,
        signing=lambda: GOOD,
        build=BUILD,
    )
    policy = CanaryPolicy(steps=0, live_s=0.0, max_slowdown=0.0)
    canaries = Canaries(versions=versions, registry=registry, policy=policy)
    service = Service(
        descriptor=pb.DESCRIPTOR.services_by_name["GraphsService"],
        servicer=GraphsServicer(graphs, canaries, Metrics()),
        add_to_server=grpc_pb.add_GraphsServiceServicer_to_server,
    )
    server = await start_server("127.0.0.1:0", [service])
    channel = open_channel(f"127.0.0.1:{server.port}")
    try:
        yield grpc_pb.GraphsServiceStub(channel)
    finally:
        await channel.close()
        await server.stop(0)


@pytest.mark.asyncio
async def test_no_damaged_artifact_of_a_store_reaches_a_worker(
    tmp_path: Path, redis_url: str
) -> None:
    registry = Registry.connect(redis_url)
    cache = GraphCache(tmp_path / "cache", TRUSTED)
    for case in damaged(tmp_path / "stores", STORED):
        async with compile_service(case.root, registry) as stub:
            with pytest.raises((ArtifactRejected, GraphNotFound)) as refusal:
                await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, version=1)
            assert str(refusal.value), case.name
    assert everything_under(tmp_path / "cache") == []
    made = graph_file(tmp_path, size=5000)
    DiskStore(tmp_path / "good").publish(*signed(manifest_for(made.read_bytes()), GOOD), made)
    async with compile_service(tmp_path / "good", registry) as stub:
        for key in (*PATHS, "f" * 32):
            call: Any = stub.FetchGraph(pb.FetchGraphRequest(key=key, version=1))
            with pytest.raises(Exception, match=r"no graph key|no artifact"):
                await call.read()
        await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, version=1)
    await registry.close()


def bundle_of(folder: Path) -> bytes:
    """Three sizes, as export writes them."""
    store = DiskStore(folder / "store")
    for size in (1, 2, 4):
        path = graph_file(folder, seed=size, size=3000)
        manifest = manifest_for(path.read_bytes(), num_tokens=str(size))
        store.publish(*signed(manifest, GOOD), path)
    file = io.BytesIO()
    write_bundle(file, serving_artifacts(store, TRUSTED))
    return file.getvalue()


def import_refused(raw: bytes, folder: Path, reason: str = ".") -> None:
    """Neither a store nor a cache takes it, and nothing is left of it."""
    store, cache = DiskStore(folder / "into"), GraphCache(folder / "cache", TRUSTED)
    for call in (
        lambda: import_into_store(io.BytesIO(raw), store, TRUSTED),
        lambda: import_into_cache(io.BytesIO(raw), cache, TRUSTED),
    ):
        with pytest.raises(ArtifactRejected, match=reason) as refusal:
            call()
        assert "\n" not in str(refusal.value)
    assert everything_under(folder) == []


def test_no_altered_bundle_is_taken(tmp_path: Path) -> None:
    raw, target = bundle_of(tmp_path / "made"), tmp_path / "target"
    for trick, reason in TRICKS.values():
        import_refused(trick(raw), target, reason)
    rng = random.Random(1)
    headers = [512 * n for n in range(len(raw) // 512)]
    for cut in (*headers, *rng.sample(range(len(raw)), BUNDLES - len(TRICKS) - len(headers))):
        import_refused(raw[:cut], target, "cut short|no bundle")


def test_no_flipped_bit_of_a_bundle_passes(tmp_path: Path) -> None:
    """Not in headers and padding either, which no signature covers."""
    raw, target = bundle_of(tmp_path / "made"), tmp_path / "target"
    rng = random.Random(2)
    for place in (*range(512), *(rng.randrange(len(raw)) for _ in range(100))):
        bit = bytes([raw[place] ^ 1 << rng.randrange(8)])
        import_refused(raw[:place] + bit + raw[place + 1 :], target)
    import_refused(flipped(raw, rng), target)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Folders of a store that lead out of it: nothing is published, noted, removed or put aside
    there."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "1").mkdir(parents=True)
    (outside / "1" / "precious").write_text("theirs")
    store = DiskStore(root)
    (root / MANIFEST.key).symlink_to(outside)
    made = graph_file(tmp_path)
    raw, signature = signed(manifest_for(made.read_bytes(), version=2), GOOD)
    refused: list[Callable[[], object]] = [
        lambda: store.publish(raw, signature, made),
        lambda: store.update_note(MANIFEST.key, lambda _: b"note"),
        lambda: store.remove(MANIFEST.key, 1),
        lambda: store.quarantine(MANIFEST.key, 1, "why"),
        lambda: store.resign(MANIFEST.key, 1, signature),
        lambda: GraphCache(root, TRUSTED).add(raw, signature, made),
    ]
    for call in refused:
        with pytest.raises(PrecastError, match="link out of the store"):
            call()
    assert store.published_keys() == []
    assert store.holdings() == []
    (root / MANIFEST.key).unlink()
    (root / MANIFEST.key).mkdir()
    (root / MANIFEST.key / "1").symlink_to(outside / "1")
    store.remove(MANIFEST.key, 1)
    store.quarantine(MANIFEST.key, 1, "why")
    assert store.put_aside(MANIFEST.key) == {1: "why"}
    assert everything_under(outside) == ["1/precious"]
    for name in (".tmp", ".quarantine"):
        other = tmp_path / f"with{name}"
        other.mkdir()
        (other / name).symlink_to(outside)
        with pytest.raises(ConfigError, match="symbolic link"):
            DiskStore(other)
    assert everything_under(outside) == ["1/precious"]
