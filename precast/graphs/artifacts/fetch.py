"""Fetches a graph from a compile worker into a worker's cache, and checks it on the way."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import grpc.aio

from precast.errors import ArtifactRejected, Unavailable
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.manifest import GRAPH_FILE
from precast.graphs.artifacts.signing import Signature
from precast.graphs.artifacts.store import StoredArtifact
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.rpc.server import error_of
from precast.system.scratch import scratch_folder

FETCH_TIMEOUT_S: Final = 60.0


async def fetch_graph(
    stub: Any,
    cache: GraphCache,
    key: str,
    *,
    spec: Mapping[str, str],
    version: int = 0,
    worker_id: str = "",
    timeout_s: float = FETCH_TIMEOUT_S,
) -> StoredArtifact:
    """Stream an artifact from a compile worker into the cache (version 0: the newest).

    ``stub`` is a ``GraphsServiceStub``; ``spec`` are the factors that the graph was asked for with.

    Raises:
        ArtifactRejected: unsigned, signed by a key that isn't trusted, not what was asked for,
            longer or shorter than signed, or of another digest. Nothing of it is kept.
        PrecastError: what the server answered, as ``precast.rpc.server.error_of`` reads it.
    """
    call = stub.FetchGraph(
        pb.FetchGraphRequest(key=key, version=version, worker_id=worker_id), timeout=timeout_s
    )
    parts = aiter(call)
    try:
        header = await _read_header(parts)
        signature = Signature(signer=header.signer, signature=header.signature)
        manifest = cache.check(header.manifest, signature, spec)
        if manifest.key != key or version not in (0, manifest.version):
            raise ArtifactRejected(
                f"asked for {key}/{version}, got {manifest.key}/{manifest.version}"
            )
        with scratch_folder(cache.temporary, key) as folder:
            await _receive(parts, folder / GRAPH_FILE, manifest.size)
            return await asyncio.to_thread(
                cache.add, header.manifest, signature, folder / GRAPH_FILE
            )
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from None
    except OSError as error:
        cache.give_up_writing(error)  # the next attempt goes there
        raise Unavailable(f"graph cache: {error}") from None
    finally:
        call.cancel()


async def _read_header(parts: AsyncIterator[pb.FetchGraphResponse]) -> pb.ArtifactHeader:
    first = await anext(parts, None)
    if first is None or first.WhichOneof("part") != "header":
        raise ArtifactRejected("stream does not begin with a header")
    return first.header


async def _receive(parts: AsyncIterator[pb.FetchGraphResponse], path: Path, size: int) -> None:
    """Write the stream's chunks to ``path``, and not one byte more than was signed."""
    received = 0
    with path.open("xb") as file:
        async for message in parts:
            if message.WhichOneof("part") != "chunk":
                raise ArtifactRejected("stream has something other than a chunk after its header")
            received += len(message.chunk)
            if received > size:
                raise ArtifactRejected(f"stream is longer than the {size} bytes that were signed")
            file.write(message.chunk)
    if received != size:
        raise ArtifactRejected(f"stream ended after {received} of {size} bytes")
