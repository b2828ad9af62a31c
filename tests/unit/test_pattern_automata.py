"""Automata of patterns: what they take is what Python's expressions find."""

import itertools
import math
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
LETTERS = "abcdogtxy019 -.@$\\éüA_"


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
    python, most = re.compile(pattern.replace("(?<m>", "(?P<m>"), re.ASCII), 3
    texts = {
        "".join(signs)
        for length in range(most + 1)
        for signs in itertools.product(LETTERS, repeat=length)
    }
    found = {text for text in texts if python.search(text)}
    if not found:
        with pytest.raises(NotRead):
            automaton(read(pattern), most=most)
        return
    states = automaton(read(pattern), most=most)
    begun = {text[:length] for text in found for length in range(most + 1)}
    assert {text for text in texts if takes(states, text)} == begun


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


SIGNS = "|".join(chr(0x4E00 + number) for number in range(480))


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        *(("^(a?){512}$", None), ("^((((a|){9}){9}){9}){9}$", None), ("(.*a){9}.{9}", None)),
        *(("^((((){512}){512}){512}){512}$", None), ("^[a-z ]+$", 1000)),
        (f"^.{{400}}(?:{SIGNS})$", None),
    ],
)
def test_large_automata_are_given_up_soon(pattern: str, most: int | None) -> None:
    began = time.thread_time()
    try:
        automaton(read(pattern), most=most)
    except NotRead:
        pass
    assert time.thread_time() - began < 4  # 0.8 s here


@pytest.mark.parametrize(
    ("pattern", "most"), [("^[a-z ]+$", 300), (f"^.{{300}}(?:{SIGNS})$", None)]
)
def test_automata_are_given_up_when_their_time_is_over(pattern: str, most: int | None) -> None:
    """Wherever they are then."""
    for share in (0.0, 0.01, 0.05):  # 0.3 s would be needed here
        began = time.thread_time()
        with pytest.raises(NotRead, match="takes too long"):
            until = began + share if most is None else -math.inf
            automaton(read(pattern), most=most, until=until)
        assert time.thread_time() - began < share + 1


def test_a_choice_is_one_of_first_bytes() -> None:
    states = automaton(read("^(ab|cd|é[à-ü]|日[日-月])$"))
    behind = {text: states.step(START, ord(text)) for text in "acé日"}
    assert [states.choices()[state] for state in (START, *behind.values())] == [
        *(True, False, False, False, False)
    ]


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
