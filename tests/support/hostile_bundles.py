"""What can be done to a bundle of graphs as a file, and the reason for which it must be refused."""

import io
import random
import tarfile
from collections.abc import Callable

import msgspec

from precast.graphs.artifacts.bundle import MAX_GRAPHS


def rewritten(
    change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None],
) -> Callable[..., bytes]:
    """The bundle with its members changed, as a tar that is well-formed."""

    def rewrite(bundle: bytes) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(bundle)) as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
        change(members)
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for info, content in members:
                info.size = len(content) if info.isreg() else 0
                tar.addfile(info, io.BytesIO(content))
            end = tar.offset + 2 * tarfile.BLOCKSIZE
        return file.getvalue()[:end]

    return rewrite


def named(place: int, name: str) -> Callable[..., bytes]:
    return rewritten(lambda members: setattr(members[place][0], "name", name))


def linked(kind: bytes) -> Callable[..., bytes]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[3][0].type = kind
        members[3][0].linkname = "/etc/passwd"

    return rewritten(change)


def contents(**fields: object) -> Callable[..., bytes]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        raw = {**msgspec.json.decode(members[0][1]), **fields}
        members[0] = (members[0][0], msgspec.json.encode(raw))

    return rewritten(change)


def content(place: int, change: Callable[[bytes], bytes]) -> Callable[..., bytes]:
    def replace(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[place] = (members[place][0], change(members[place][1]))

    return rewritten(replace)


KEY = "0123456789abcdef" * 2
TRICKS: dict[str, tuple[Callable[..., bytes], str]] = {
    "path up": (named(3, "../../evil"), "stands in the place of"),
    "absolute path": (named(1, "/tmp/evil"), "stands in the place of"),
    "long name": (named(1, "a/" * 200), "stands in the place of"),
    "symbolic link": (linked(tarfile.SYMTYPE), "stands in the place of"),
    "hard link": (linked(tarfile.LNKTYPE), "stands in the place of"),
    "device": (linked(tarfile.CHRTYPE), "stands in the place of"),
    "folder": (linked(tarfile.DIRTYPE), "stands in the place of"),
    "order": (rewritten(lambda members: members.insert(1, members.pop(4))), "stands in the place"),
    "one more": (rewritten(lambda m: m.append(m[1])), "more in the file"),
    "one less": (rewritten(lambda m: m.__delitem__(slice(-1, None))), "no bundle of graphs"),
    "tail": (lambda raw: raw + b"x", "more in the file"),
    "contents: path": (contents(graphs=[{"key": "../x", "version": 1}]), "no graph key"),
    "contents: nothing": (contents(graphs=[]), "malformed"),
    "contents: twice": (contents(graphs=[{"key": KEY, "version": 1}] * 2), "a graph twice"),
    "contents: many": (
        contents(graphs=[{"key": KEY, "version": n + 1} for n in range(MAX_GRAPHS + 1)]),
        "malformed",
    ),
    "contents: format": (contents(format=2), "format 2"),
    "contents: huge": (content(0, lambda raw: raw + b" " * (1 << 20)), "exceeds"),
    "manifest": (content(1, lambda raw: raw + b" "), "does not match"),
    "manifest: huge": (content(1, lambda raw: raw * 1000), "exceeds"),
    "signature": (content(2, lambda raw: b"0" * 16 + raw[16:]), "not trusted"),
    "signature: none": (content(2, lambda raw: b""), "malformed"),
    "graph: bit": (content(3, lambda raw: bytes([raw[0] ^ 1]) + raw[1:]), "digest"),
    "graph: longer": (content(3, lambda raw: raw + b"x"), "its manifest says"),
    "graph: shorter": (content(3, lambda raw: raw[:-1]), "its manifest says"),
    "last graph": (content(-1, lambda raw: raw[:-1] + b"?"), "digest"),
    "empty": (lambda raw: b"", "cut short"),
    "noise": (lambda raw: random.Random(1).randbytes(4096), "no bundle of graphs"),
}
