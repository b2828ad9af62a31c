"""Automata of patterns: what they take is what Python's expressions find."""

import random
import re
import time

import pytest

from services.decode_worker.constraints.addresses import EMAIL, HOSTNAME, URI
from services.decode_worker.constraints.automata import DEAD, START, Automaton, automaton
from services.decode_worker.constraints.regexes import NotRead, read

READ = (
    *("cat|dog", "^[A-Z]{2}-[0-9]{3}$", r"^\d{2,4}\s?(am|pm)$", "^(a|b)*abb$", "a.c", "^$", ""),
    *("^[^a-c]{2,}$", r"^[\w.-]+@\w+$", "^(?:ab?){1,3}?c+$", "^((a|bc)+|d)*$", r"^\\\$\x61$"),
    *("^x{0}y{0,2}$", r"[\d-]\D\S\W", "^(|a)b$", "^(?P<n>a)(?<m>b)$", "^é[à-ü]$"),
)
LETTERS = "abcdxy019 -.@$\\éüA_"


def takes(states: Automaton, text: str) -> bool:
    """Whether something may follow it, or nothing need to."""
    at = START
    for sign in text:
        at = states.step(at, ord(sign))
    return at != DEAD


def of_length(pattern: str, length: int) -> Automaton | None:
    """Of its texts of exactly so many characters, if there are any."""
    try:
        return automaton(read(pattern), length, length)
    except NotRead:
        return None


@pytest.mark.parametrize("pattern", READ)
def test_texts_are_those_that_the_expression_finds(pattern: str) -> None:
    states = [of_length(pattern, length) for length in range(7)]
    python, draw = re.compile(pattern.replace("(?<m>", "(?P<m>"), re.ASCII), random.Random(1)
    for _ in range(3000):
        text = "".join(draw.choices(LETTERS, k=draw.randint(0, 6)))
        known = states[len(text)]
        assert (known is not None and takes(known, text)) == bool(python.search(text)), text


@pytest.mark.parametrize("pattern", READ)
def test_beginnings_are_those_of_some_text(pattern: str) -> None:
    """No state is alive that no end can be reached from."""
    states = automaton(read(pattern))
    assert states.targets[DEAD] == (DEAD,) * len(states.targets[DEAD])
    assert len(states.targets) > START


@pytest.mark.parametrize(
    "pattern",
    [
        *("^a|b$", "a^b", "a$b", "(?=a)", "(?!a)", "(?i)a", r"\bword", r"(a)\1", "a**", "a{2}{3}"),
        *(
            "[a[b]]",
            "[a&&b]",
            "[]a]",
            "[b-a]",
            r"[\d-z]",
            "a{600}",
            "(a",
            "a)",
            "[a",
            "a\\",
            r"\p{L}",
        ),
        *("(" * 400 + ")" * 400, "a" * 3000, r"\ud83d", "x{3,2}"),
    ],
)
def test_what_may_be_read_in_another_way_is_not_read(pattern: str) -> None:
    with pytest.raises(NotRead):
        read(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["^(a?){512}$", "^((((a|){9}){9}){9}){9}$", "^((((){512}){512}){512}){512}$", "(.*a){9}.{9}"],
)
def test_large_automata_are_given_up_soon(pattern: str) -> None:
    began = time.thread_time()
    try:
        automaton(read(pattern))
    except NotRead:
        pass
    assert time.thread_time() - began < 2  # 0.2 s here


def test_lengths_count_characters() -> None:
    states = automaton(read("^(ab|é)+$"), least=2, most=3)
    assert takes(states, "abé")
    assert takes(states, "ab")
    assert not takes(states, "ababé"[:4])
    assert not takes(states, "éééé")
    with pytest.raises(NotRead):
        automaton(read("^abc$"), least=0, most=2)


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (
            EMAIL,
            ("a@b", "a.b+c@ex-ample.org", "x@[10.0.0.255]"),
            (
                "a",
                "@b",
                "a..b@c",
                "a@-b",
                "a@b-",
                "a@xn--b",
                "a" * 65 + "@b",
                "a@[1.2.3]",
                ".a@b",
                "a b@c",
            ),
        ),
        (
            HOSTNAME,
            ("a", "www.example.org", "a-b.c", "a" * 63, "a--b", "a-b-c", "abcd--e"),
            ("-a", "a-", "a..b", "a b", "a" * 64, "", "a.-b", "a.xn--b", "a---b"),
        ),
        (
            URI,
            (
                *(
                    "https://example.org/a?b=c#d",
                    "mailto:a@b.c",
                    "urn:x:y",
                    "a:",
                    "a:/",
                    "file:///x",
                ),
                *(
                    "http://u:p@h:80/%20",
                    "http://[::1]/",
                    "http://[1:2:3:4:5:6:7:8]:1",
                    "http://[v1.a]",
                ),
                *("http://[1::8]", "http://[1:2:3:4:5:6:7::]", "http://1.2.3.4"),
            ),
            (
                *("not a uri", "//x", "1a:b", "a:b c", "http://[1:2]", "http://[1::2::3]", "a:%2"),
                *("http://[1:2:3:4:5:6:7:8:9]", "a:[", "http://h:x/", "a#b", "http://[:::]"),
            ),
        ),
    ],
)
def test_addresses(pattern: str, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    states, python = automaton(read(f"^{pattern}\n$")), re.compile(pattern)
    for text in right:
        assert takes(states, text + "\n")
        assert python.fullmatch(text)
    for text in wrong:
        assert not takes(states, text + "\n")
        assert not python.fullmatch(text)
