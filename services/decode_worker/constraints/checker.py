"""A process that tries grammars: ``python -m services.decode_worker.constraints.checker --fd N``.

A grammar may take minutes, gigabytes or more stack than there is. So each is tried in a fork, whose
end is all that it can cause. What passes there passes in the worker too: its thread has more stack,
and the same limits.
"""

import argparse
import contextlib
import faulthandler
import os
import resource
import select
import signal
import socket
import struct
from pathlib import Path
from typing import Final

import msgspec

from precast.system.process import die_with_parent
from services.decode_worker.constraints.grammar import Grammar, refusal
from services.decode_worker.constraints.matcher import Vocabulary
from services.decode_worker.constraints.trial import trial

HEADER: Final = struct.Struct("<I")
CHECK_S: Final = 1.5
"""How long a grammar may take to be tried."""
TOO_LONG: Final = f"takes more than {CHECK_S:g} s"
STACK_BYTES: Final = 2 << 20
"""A quarter of what a thread of the worker has."""
MEMORY_BYTES: Final = 384 << 20
"""That a grammar may take, beside the vocabulary."""
MAX_REFUSAL: Final = 4096
"""Bytes: what a pipe takes at once."""


class Setup(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """First message."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Check(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    kind: str
    text: str


class Checked(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Answer to both."""

    refusal: str


encode: Final = msgspec.msgpack.Encoder().encode
decode_order: Final = msgspec.msgpack.Decoder(Setup | Check).decode
decode_answer: Final = msgspec.msgpack.Decoder(Checked).decode


def framed(message: Setup | Check | Checked) -> bytes:
    body = encode(message)
    return HEADER.pack(len(body)) + body


def serve(connection: socket.socket) -> None:
    """Until the worker is gone."""
    setup = _receive(connection)
    if not isinstance(setup, Setup):
        return
    try:
        vocabulary = Vocabulary(setup.tokenizer, setup.vocab_size, setup.eos_token_ids)
    except ValueError as error:
        connection.sendall(framed(Checked(refusal=str(error))))
        return
    connection.sendall(framed(Checked(refusal="")))
    while isinstance(order := _receive(connection), Check):
        found = checked(vocabulary, Grammar(kind=order.kind, text=order.text))
        connection.sendall(framed(Checked(refusal=found)))


def checked(vocabulary: Vocabulary, grammar: Grammar) -> str:
    """Why the grammar is refused; empty if it is not."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _try(vocabulary, grammar, writing)
    os.close(writing)
    try:
        in_time = bool(select.select([reading], [], [], CHECK_S)[0])
        found = os.read(reading, MAX_REFUSAL) if in_time else b""
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if found:
        return found[1:].decode(errors="ignore")
    return refusal(grammar.kind, _cause(status) if in_time else TOO_LONG)


def _cause(status: int) -> str:
    """Of a death without a word."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV:
        return "is nested too deeply"
    return "takes too much memory"


def _try(vocabulary: Vocabulary, grammar: Grammar, writing: int) -> None:
    """In the fork, which it ends. What is written begins with a byte that stands for nothing."""
    try:
        die_with_parent(signal.SIGKILL)
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # how it dies is told in one line
        os.nice(5)
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        os.write(writing, b"." + _tried(vocabulary, grammar).encode()[: MAX_REFUSAL - 1])
    finally:
        os._exit(0)


def _tried(vocabulary: Vocabulary, grammar: Grammar) -> str:
    """Why the grammar is refused; empty if it is not. Raises MemoryError."""
    try:
        return trial(vocabulary, grammar)
    except ValueError as error:  # of the library's: what it can't read
        return refusal(grammar.kind, str(error))


def _receive(connection: socket.socket) -> Setup | Check | None:
    header = connection.recv(HEADER.size, socket.MSG_WAITALL)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    body = connection.recv(size, socket.MSG_WAITALL)
    return decode_order(body) if len(body) == size else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="services.decode_worker.constraints.checker")
    parser.add_argument("--fd", type=int, required=True)
    connection = socket.socket(fileno=parser.parse_args().fd)
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides when it ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ConnectionError):  # the worker is gone
        serve(connection)


if __name__ == "__main__":
    main()
