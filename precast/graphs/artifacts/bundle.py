"""Graphs as one file: what an image ships with, and what crosses an air gap.

A bundle is a plain tar (``tar tf`` lists it) of ``contents.json`` and then, for each graph that
this names, ``<key>/<version>/manifest.json``, ``manifest.sig`` and ``graph.pt2``. Nothing else
may be in it, in no other order: the reader knows each name and the most bytes that it may have
before it reads on, so that a bundle can't choose a path, and no bit of it can be another. It holds
no keys: whom to trust is the reader's own business.
"""

import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import msgspec

from precast.errors import ArtifactRejected
from precast.graphs.artifacts.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    READ_BYTES,
    SIGNATURE_FILE,
    Manifest,
    Version,
    check_graph_file,
    decode_manifest,
)
from precast.graphs.artifacts.signing import MAX_SIGNATURE_FILE_BYTES, Signature
from precast.graphs.artifacts.store import StoredArtifact
from precast.graphs.artifacts.trust import Trust
from precast.graphs.key import is_key

FORMAT: Final = 1
CONTENTS_FILE: Final = "contents.json"
MAX_GRAPHS: Final = 4096
MAX_CONTENTS_BYTES: Final = 1 << 20
MAX_BUNDLE_BYTES: Final = 8 << 30
"""Of all graphs together."""
_BLOCK: Final = tarfile.BLOCKSIZE


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One graph of a bundle."""

    key: str
    version: Version


class Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle holds, in this order."""

    format: int = FORMAT
    graphs: Annotated[tuple[Entry, ...], msgspec.Meta(min_length=1, max_length=MAX_GRAPHS)]


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A graph out of a bundle, verified, under a name of no meaning."""

    manifest: Manifest
    manifest_bytes: bytes
    signature: Signature
    graph_path: Path


def write_bundle(file: BinaryIO, artifacts: Sequence[StoredArtifact]) -> None:
    """Write artifacts to ``file``, which need not be seekable."""
    entries = tuple(
        Entry(key=artifact.manifest.key, version=artifact.manifest.version)
        for artifact in artifacts
    )
    _write(file, CONTENTS_FILE, msgspec.json.encode(Contents(graphs=entries)))
    for artifact in artifacts:
        folder = f"{artifact.manifest.key}/{artifact.manifest.version}"
        _write(file, f"{folder}/{MANIFEST_FILE}", artifact.manifest_bytes)
        _write(file, f"{folder}/{SIGNATURE_FILE}", artifact.signature.encode())
        file.write(_header(f"{folder}/{GRAPH_FILE}", artifact.manifest.size))
        with artifact.graph_path.open("rb") as graph:
            shutil.copyfileobj(graph, file, READ_BYTES)
        file.write(_padding(artifact.manifest.size))
    file.write(bytes(2 * _BLOCK))


def unpack_bundle(file: BinaryIO, folder: Path, trusted: Trust) -> list[Unpacked]:
    """Read a bundle and put its graphs into ``folder``, an empty one, once all are verified.

    A graph's bytes are read only after its manifest's signature and signed size have been checked.

    Raises:
        ArtifactRejected: not a bundle, cut, with anything in it that doesn't belong there, or a
            graph that isn't signed by a trusted key or not what was signed.
    """
    contents = _read_contents(file)
    unpacked: list[Unpacked] = []
    for number, entry in enumerate(contents.graphs):
        graph = _unpack_one(file, entry, folder / str(number), trusted)
        unpacked.append(graph)
        if sum(each.manifest.size for each in unpacked) > MAX_BUNDLE_BYTES:
            raise ArtifactRejected(f"graphs have more than {MAX_BUNDLE_BYTES} bytes in all")
    if _exactly(file, 2 * _BLOCK).strip(b"\0") or file.read(1):
        raise ArtifactRejected(f"there is more in the file than its {CONTENTS_FILE} names")
    return unpacked


def _read_contents(file: BinaryIO) -> Contents:
    raw = _read(file, CONTENTS_FILE, MAX_CONTENTS_BYTES)
    try:
        contents = msgspec.json.decode(raw, type=Contents)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactRejected(f"{CONTENTS_FILE} is malformed: {error}") from None
    if contents.format != FORMAT:
        raise ArtifactRejected(f"file has format {contents.format}; {FORMAT} is supported")
    for entry in contents.graphs:
        if not is_key(entry.key):
            raise ArtifactRejected(f"{entry.key[:64]!r} is no graph key (32 hex digits)")
    if len(set(contents.graphs)) != len(contents.graphs):
        raise ArtifactRejected(f"{CONTENTS_FILE} names a graph twice")
    return contents


def _unpack_one(file: BinaryIO, entry: Entry, path: Path, trusted: Trust) -> Unpacked:
    name = f"{entry.key}/{entry.version}"
    raw = _read(file, f"{name}/{MANIFEST_FILE}", MAX_MANIFEST_BYTES)
    signature_file = _read(file, f"{name}/{SIGNATURE_FILE}", MAX_SIGNATURE_FILE_BYTES)
    try:
        signature = Signature.decode(signature_file)
        trusted.verify(raw, signature)
        manifest = decode_manifest(raw)
        if Entry(key=manifest.key, version=manifest.version) != entry:
            raise ArtifactRejected("manifest is that of another graph")
        _copy(file, f"{name}/{GRAPH_FILE}", manifest.size, path)
        check_graph_file(path, manifest)
    except ArtifactRejected as error:
        raise ArtifactRejected(f"graph {name}: {error}") from None
    return Unpacked(manifest=manifest, manifest_bytes=raw, signature=signature, graph_path=path)


def _write(file: BinaryIO, name: str, content: bytes) -> None:
    file.write(_header(name, len(content)))
    file.write(content)
    file.write(_padding(len(content)))


def _header(name: str, size: int) -> bytes:
    """Depends on nothing but name and size: the same graphs give the same file."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _read(file: BinaryIO, name: str, limit: int) -> bytes:
    """The member that has to come next."""
    size = _read_header(file, name)
    if size > limit:
        raise ArtifactRejected(f"{name} of {size} bytes exceeds {limit}")
    content = _exactly(file, size)
    _skip_padding(file, size)
    return content


def _copy(file: BinaryIO, name: str, size: int, path: Path) -> None:
    """Like ``_read``, into a new file and of exactly the size that was signed."""
    found = _read_header(file, name)
    if found != size:
        raise ArtifactRejected(f"has {found} bytes, its manifest says {size}")
    with path.open("xb") as copy:
        for start in range(0, size, READ_BYTES):
            copy.write(_exactly(file, min(READ_BYTES, size - start)))
    _skip_padding(file, size)


def _read_header(file: BinaryIO, name: str) -> int:
    """The next member's size. It must be a plain file of this name, written as we do."""
    raw = _exactly(file, _BLOCK)
    try:
        info = tarfile.TarInfo.frombuf(raw, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        raise ArtifactRejected(f"no bundle of graphs, or a damaged one, at {name}") from None
    if info.name != name or info.type != tarfile.REGTYPE:
        raise ArtifactRejected(f"{info.name[:100]!r} stands in the place of the file {name}")
    if info.size < 0 or raw != _header(name, info.size):
        raise ArtifactRejected(f"{name} was not packed by precast graphs export")
    return info.size


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise ArtifactRejected("file is cut short")
    return content


def _skip_padding(file: BinaryIO, size: int) -> None:
    if _exactly(file, len(_padding(size))) != _padding(size):
        raise ArtifactRejected("there is something between two files")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)
