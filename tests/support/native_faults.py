"""Graph packages whose native code misbehaves: a real package with a few bytes changed.

A package's shared libraries export ``AOTInductorModelContainerRunSingleThreaded``, which the loader
looks up by name. ``crashing``, ``crashing_if`` and ``slow`` let that name point to code of their
own, written over the multi-threaded variant, which nobody calls; it ends in a jump to the real one.
``wrong`` changes a constant.
"""

import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

RUN = b"AOTInductorModelContainerRunSingleThreaded"
UNUSED = b"AOTInductorModelContainerRun"

CRASH = bytes.fromhex("c6042500000000 00")  # mov byte [0], 0
SAVE = bytes.fromhex("57 56 52 51 4150 4151 4883ec18")  # push the arguments; room on the stack
RESTORE = bytes.fromhex("4883c418 4159 4158 59 5a 5e 5f")
ACCESS = bytes.fromhex("b815000000 488d3d")  # access(rip + what follows, F_OK): 7 bytes and 4
UNLESS_FOUND = bytes.fromhex("31f6 0f05 85c0 7508")  # go 8 bytes further
NANOSLEEP = bytes.fromhex("4889e7 31f6 b823000000 0f05")  # nanosleep(rsp, NULL)


def crashing(package: Path, target: Path) -> Path:
    """Dies of SIGSEGV at its first replay."""
    return _rewrite(package, target, lambda library: _hooked(library, CRASH))


def crashing_if(package: Path, target: Path, there: Path) -> Path:
    """Right, but dies of SIGSEGV while there is a file of this name."""
    name = bytes(there) + b"\0"
    over_name = bytes([0xEB, len(name)]) + name  # jmp
    before = over_name + SAVE + ACCESS
    to_name = struct.pack("<i", 2 - (len(before) + 4))
    code = before + to_name + UNLESS_FOUND + CRASH + RESTORE
    return _rewrite(package, target, lambda library: _hooked(library, code))


def slow(package: Path, target: Path, milliseconds: int) -> Path:
    """Right, but each of its models sleeps before it runs."""
    seconds = bytes.fromhex("48c7042400000000")  # mov qword [rsp], 0
    nanoseconds = bytes.fromhex("48c7442408") + struct.pack("<i", milliseconds * 1_000_000)
    code = SAVE + seconds + nanoseconds + NANOSLEEP + RESTORE
    return _rewrite(package, target, lambda library: _hooked(library, code))


def wrong(package: Path, target: Path, was: float, shall_be: float) -> Path:
    """As if captured with another argument of an operator."""
    old, new = struct.pack("<d", was), struct.pack("<d", shall_be)
    changed: list[int] = []

    def change(library: bytes) -> bytes:
        changed.append(library.count(old))
        return library.replace(old, new)

    _rewrite(package, target, change)
    assert sum(changed), f"{was} is no constant of {package}"
    return target


def _rewrite(package: Path, target: Path, change: Callable[[bytes], bytes]) -> Path:
    """The package with every shared library changed."""
    made = BytesIO()
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(made, "w") as copy:
        for entry in source.infolist():
            content = source.read(entry)
            copy.writestr(entry, change(content) if entry.filename.endswith(".so") else content)
    target.write_bytes(made.getvalue())
    return target


def _hooked(library: bytes, code: bytes) -> bytes:
    """The library with ``code`` run before RUN."""
    image = bytearray(library)
    symbols = {name: (at, value, size) for name, at, value, size in _symbols(library)}
    entry, run, _ = symbols[RUN]
    _, cave, room = symbols[UNUSED]
    jump = b"\xe9" + struct.pack("<i", run - (cave + len(code) + 5))
    assert len(code) + len(jump) <= room
    at = _file_offset(library, cave)
    image[at : at + len(code) + 5] = code + jump
    struct.pack_into("<Q", image, entry + 8, cave)
    return bytes(image)


def _symbols(library: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, place of the entry in the file, address and size of each dynamic symbol."""
    sections = list(_sections(library))
    table = next(section for section in sections if section[1] == 11)  # SHT_DYNSYM
    names = sections[table[6]][4]
    for at in range(table[4], table[4] + table[5], 24):
        name, _, _, _, value, size = struct.unpack_from("<IBBHQQ", library, at)
        end = library.index(b"\0", names + name)
        yield library[names + name : end], at, value, size


def _sections(library: bytes) -> Iterator[tuple[int, ...]]:
    """ELF64 section headers."""
    (start,) = struct.unpack_from("<Q", library, 40)
    (count,) = struct.unpack_from("<H", library, 60)
    for index in range(count):
        yield struct.unpack_from("<IIQQQQIIQQ", library, start + 64 * index)


def _file_offset(library: bytes, address: int) -> int:
    for _, _, _, where, offset, size, *_ in _sections(library):
        if where and where <= address < where + size:
            return offset + address - where
    raise AssertionError(f"address {address:#x} is in no section")
