"""Grammars from clients: tried in a process of their own, within bounds, and remembered."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from precast.errors import InvalidRequest, Overloaded, Unavailable
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.constraints import checker
from services.decode_worker.constraints import compiler as constraint_compiler
from services.decode_worker.constraints.checker import Setup
from services.decode_worker.constraints.compiler import ConstraintCompiler
from services.decode_worker.constraints.grammar import MAX_BYTES, Grammar, grammar_of
from services.decode_worker.constraints.matcher import Vocabulary
from tests.support.constraints import allowed
from tests.support.models import VOCABULARY, _tokenizer

SETUP = Setup(tokenizer=_tokenizer().to_str(), vocab_size=VOCABULARY, eos_token_ids=(256,))
WORDS = Grammar(kind="regex", text="[a-z]+")
ENDLESS = Grammar(kind="regex", text="".join(f"([a-z]{{0,99}}{x})?" for x in "abcdefghij" * 400))
DEEP = "\n".join(f'r{i}: r{i + 1} "x" | r{i + 2}' for i in range(6000))


@pytest.fixture
async def compiler() -> AsyncIterator[ConstraintCompiler]:
    made = ConstraintCompiler(lambda: SETUP)
    await made.open()
    yield made
    await made.close()


async def refused(compiler: ConstraintCompiler, grammar: Grammar) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        await compiler.compile(grammar)
    return str(refusal.value)


async def test_a_grammar_is_compiled_once(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiler.known(WORDS) is None
    first, second = await asyncio.gather(compiler.compile(WORDS), compiler.compile(WORDS))
    monkeypatch.setattr(compiler._checker, "check", None)
    third = compiler.known(WORDS)
    assert third is not None
    first.take(ord("a") - ord("!"))  # of the vocabulary's letters
    assert first.may_end
    assert not (second.may_end or third.may_end)
    assert allowed(second) == allowed(third)


async def test_refusals_are_one_line_and_remembered(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {
        Grammar(kind="regex", text="(a"): "constraint: regex: unclosed group",
        Grammar(kind="regex", text="(?=a)b"): "look-around",
        Grammar(kind="lark", text='start: "a" other'): 'unknown name: "other"',
        Grammar(kind="lark", text="begin: /a/"): "start",
        Grammar(kind="json_schema", text='{"type": "strin"}'): "strin",
        Grammar(kind="json_schema", text='{"$ref": "http://example.org/x"}'): "example.org",
        Grammar(kind="json_schema", text='{"uniqueItems": true}'): "not supported: uniqueItems",
        Grammar(kind="json_schema", text='{"allOf": [{"type": "null"}, {"enum": [1]}]}'): "schema",
    }
    for grammar, words in cases.items():
        message = await refused(compiler, grammar)
        assert words in message
        assert message.startswith(f"constraint: {grammar.kind}: ")
        assert "\n" not in message
    monkeypatch.setattr(compiler._checker, "check", None)
    for grammar, words in cases.items():
        assert words in await refused(compiler, grammar)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (ENDLESS, ": takes "),  # too long, or too much memory where the machine is quick
        (Grammar(kind="lark", text=f'start: r0\n{DEEP}\nr6000: "a"\nr6001: "b"\n'), "too deeply"),
        (Grammar(kind="regex", text="((((a{100}){100}){100}){100}){100}"), ""),
    ],
    ids=["endless", "deep", "repeated"],
)
async def test_what_is_too_much_ends_in_time_and_hurts_nobody(
    compiler: ConstraintCompiler, grammar: Grammar, words: str
) -> None:
    await compiler.warm()
    beside = asyncio.create_task(compiler.compile(WORDS))
    began, longest = time.monotonic(), 0.0
    bad = asyncio.create_task(refused(compiler, grammar))
    while not bad.done():
        before = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - before)
    assert words in await bad
    assert time.monotonic() - began < 2 + 4  # a loaded machine's seconds
    assert longest < 1.0, "the event loop was held up"
    assert allowed(await beside)
    assert allowed(await compiler.compile(Grammar(kind="regex", text="[0-9]")))


def hunger(memory_bytes: int) -> list[str]:
    """Why a grammar that takes much memory is refused, and one that takes little."""
    checker.MEMORY_BYTES = memory_bytes  # type: ignore[misc]
    known = Vocabulary(SETUP.tokenizer, SETUP.vocab_size, SETUP.eos_token_ids)
    hungry = Grammar(kind="regex", text=r"\w+\s*" * 10_000)
    return [checker.checked(known, grammar) for grammar in (hungry, WORDS)]


@pytest.mark.parametrize(
    ("memory_bytes", "refused"),
    [(384 << 20, ""), (4 << 20, "constraint: regex: takes too much memory")],
)
def test_a_grammar_has_so_much_memory(memory_bytes: int, refused: str) -> None:
    """In a fresh process: one that has run tests has memory left that a fork can use."""
    program = (
        "import json; from tests.unit.test_constraint_compiler import hunger;"
        f"print(json.dumps(hunger({memory_bytes})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [refused, ""]


async def test_the_text_has_a_bound() -> None:
    million = "|".join(map(str, range(1_000_000)))
    for field in ("regex", "lark", "json_schema"):
        began = time.monotonic()
        with pytest.raises(InvalidRequest, match=f"{field} has .* bytes: at most {MAX_BYTES}"):
            grammar_of(pb.OutputConstraint(**{field: million}))
        assert time.monotonic() - began < 1
    for schema in ("{", "[1]", "3", "[" * 100_000):
        with pytest.raises(InvalidRequest, match="json_schema"):
            grammar_of(pb.OutputConstraint(json_schema=schema))
    with pytest.raises(InvalidRequest, match="one of json_schema, regex and lark"):
        grammar_of(pb.OutputConstraint())


async def test_other_threads_of_the_worker_have_no_part_in_it(
    compiler: ConstraintCompiler,
) -> None:
    """Ranks are launched and graphs loaded in the loop's own threads: here all of them are busy."""
    others, done = ThreadPoolExecutor(1), threading.Event()
    asyncio.get_running_loop().set_default_executor(others)
    busy = others.submit(done.wait, 60)
    try:
        assert allowed(await asyncio.wait_for(compiler.compile(WORDS), 30))
        assert not busy.done()
    finally:
        done.set()


async def test_too_many_at_once_are_refused(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint_compiler, "WAITING", 2)
    grammars = [Grammar(kind="regex", text=f"{number}") for number in range(5)]
    found = await asyncio.gather(*map(compiler.compile, grammars), return_exceptions=True)
    assert sum(isinstance(each, Overloaded) for each in found) == 3
    assert allowed(await compiler.compile(grammars[4]))


async def test_what_is_remembered_has_a_bound(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint_compiler, "CACHED", 2)
    grammars = [Grammar(kind="regex", text=f"{number}") for number in range(3)]
    for grammar in grammars[:2]:
        await compiler.compile(grammar)
    assert compiler.known(grammars[0]) is not None  # asked for last
    await compiler.compile(grammars[2])
    assert [compiler.known(grammar) is None for grammar in grammars] == [False, True, False]


async def test_a_request_that_gives_up_leaves_others_theirs(compiler: ConstraintCompiler) -> None:
    impatient = asyncio.create_task(compiler.compile(WORDS))
    await asyncio.sleep(0)
    patient = asyncio.create_task(compiler.compile(WORDS))
    await asyncio.sleep(0)
    impatient.cancel()
    assert allowed(await patient)


async def test_a_killed_process_is_replaced(compiler: ConstraintCompiler) -> None:
    await compiler.warm()
    assert compiler._checker is not None
    process = compiler._checker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert allowed(await compiler.compile(WORDS))
    await compiler.close()
    again = compiler._checker._process
    assert again is None


async def test_the_process_ends_with_the_compiler(compiler: ConstraintCompiler) -> None:
    await compiler.warm()
    assert compiler._checker is not None
    assert compiler._checker._process is not None
    pid = compiler._checker._process.pid
    await compiler.close()
    assert not Path(f"/proc/{pid}").exists()


async def test_a_tokenizer_that_is_not_known_constrains_nothing() -> None:
    setup = Setup(tokenizer="{}", vocab_size=10, eos_token_ids=(1,))
    made = ConstraintCompiler(lambda: setup)
    early = asyncio.create_task(refused(made, WORDS))
    await asyncio.sleep(0)
    await made.open()
    await made.warm()
    assert "can't constrain" in await early
    with pytest.raises(InvalidRequest, match="can't constrain"):
        made.known(WORDS)
    await made.close()


async def test_a_grammar_that_comes_early_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ConstraintCompiler(lambda: SETUP)
    early = asyncio.create_task(made.compile(WORDS))
    await asyncio.sleep(0.01)
    assert not early.done()
    await made.open()
    assert allowed(await early)
    await made.close()
    monkeypatch.setattr(constraint_compiler, "OPEN_S", 0.01)
    with pytest.raises(Unavailable, match="yet"):
        await ConstraintCompiler(lambda: SETUP).compile(WORDS)
