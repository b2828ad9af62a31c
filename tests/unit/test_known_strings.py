"""Masks within strings with a pattern or a length: as llguidance makes them by itself."""

import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from services.decode_worker.constraints.formats import with_strict_formats
from services.decode_worker.constraints.marked_schema import MARKS, mark, marked
from services.decode_worker.constraints.matcher import Matcher, Vocabulary
from services.decode_worker.constraints.warming import warm
from tests.support.constraints import allowed, json_grammar, set_bits, vocabulary
from tests.support.json_schemas import array, closed, composed
from tests.support.tokenizers import byte_level, sentence_piece

PIECES = (
    *("a", "b", "ex", "am", "ple", "org", "www", "http", "A", "INV", "X", "0", "12", "9", ".", "-"),
    *("@", "/", ":", "?", "%", "4f", "_", " ", "cat", "do", "é", "日本", "\U0001f642", '"', '",'),
    *("\u00a0", "\u0085", "\u2028", "\u3000"),
    *("\\", "\\n", "\n", "\t", "[", "]", "}", "{", "true"),
)
PATTERNS = (
    *("^[a-z][a-z0-9-]{0,13}$", "cat|dog", "^(cat|dog|a+)x?$", r"^\d{2,4}\s?(am|pm)$", r"^\w+$"),
    *(r"^\S{2,5}$", "^.{1,20}$", "^[^@ ]+@[^@ ]+$", "a.c", "^$", "^[A-Z]{2}-[0-9]{3}$", "[é-日]+"),
    *("^(?:a|b)*?abb$", r"^[\w.-]+$", r"^\u0061[\x62-d]$", r"\s", '^"a"$', r"^a\\b$", "^\n?a"),
)
WITHOUT_CHOICES = ("^$", '^"a"$', r"^a\\b$")
"""What has no escapes in them leaves one thing to write."""
SPELLED = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def tokenizer() -> Tokenizer:
    """Byte-level, with many tokens of some pieces."""
    data, draw = json.loads(byte_level().to_str()), random.Random(3)
    names = data["model"]["vocab"]
    for _ in range(900):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 4)))
        names.setdefault(SPELLED.pre_tokenize_str(text)[0][0], len(names))
    return Tokenizer.from_str(json.dumps(data))


VOCABULARY = vocabulary(tokenizer(), "<end>")
END = tokenizer().token_to_id("<end>")


def strings(*schemas: Any) -> Any:
    """An object with one of each."""
    return closed({f"p{at}": schema for at, schema in enumerate(schemas)})


def by_itself(matcher: Matcher) -> list[int]:
    """What llguidance allows."""
    plain = matcher.copy()
    plain._strings = None
    return allowed(plain)


def walked(schema: Any, seed: int, steps: int = 30, known: Vocabulary = VOCABULARY) -> int:
    """Along a made-up answer: how many masks were made here. All are as llguidance's."""
    matcher, draw, made = known.compile(json_grammar(schema)), random.Random(seed), 0
    assert not matcher.error
    for _ in range(steps):
        words, right = np.zeros(matcher.width, dtype=np.int32), by_itself(matcher)
        if matcher._strings and matcher._strings.fill(words):
            made += 1
            assert set_bits(words) == right, (schema, seed)
        longest = max(right, key=lambda token: (len(known.bytes_of(token)), draw.random()))
        matcher.take(longest if draw.random() < 0.2 else draw.choice(right))
        assert not matcher.error
        if matcher.is_complete:
            break
    return made


def test_masks_of_all_kinds_of_schemas_are_the_same() -> None:
    schemas = [
        schema for schema in composed(300) if marked(with_strict_formats(json.dumps(schema)))
    ]
    assert len(schemas) > 120
    assert sum(walked(schema, seed) for seed, schema in enumerate(schemas)) > 300


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_patterns_are_the_same(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    bounded = {**schema, "minLength": 3, "maxLength": 6}
    made = 0
    for seed in range(4):
        made += walked(schema, seed)
        walked(strings(schema, {"maxLength": 2}), seed)
        if VOCABULARY.compile(json_grammar(bounded)).error == "":
            walked(strings({"anyOf": [bounded, {"type": "null"}]}), seed)
    assert (made > 0) == (pattern not in WITHOUT_CHOICES)


def answer(schema: Any, seed: int) -> bytes | None:
    """A made-up one that came to its end; strings and lists are often ended."""
    matcher, draw, found = VOCABULARY.compile(json_grammar(schema)), random.Random(seed), b""
    for _ in range(150):
        if matcher.is_complete or (matcher.may_end and draw.random() < 0.3):
            return found
        may = [token for token in allowed(matcher) if token != END]
        ending = [token for token in may if VOCABULARY.bytes_of(token)[:1] in b'"]},']
        token = draw.choice(ending if ending and draw.random() < 0.5 else may)
        found += VOCABULARY.bytes_of(token)
        matcher.take(token)
        assert not matcher.error
    return None


def test_answers_to_composed_schemas_that_end_are_valid() -> None:
    """As ``bench.constraints schemas`` asks of a served model."""
    ended = 0
    for seed, schema in enumerate(composed(500)[::5]):
        text = answer(schema, seed)
        if text is None:
            continue
        ended += 1
        value = json.loads(text, parse_float=lambda number: min(float(number), 1e300))
        check = jsonschema_rs.validator_for(schema, validate_formats=True)
        assert check.is_valid(value), (schema, value)
    assert ended > 50


LENGTH = {"type": "string", "maxLength": 5}
NAME = {"type": "string", "pattern": "^[a-z]+$"}
MAIL = {"type": "string", "format": "email"}


@pytest.mark.parametrize(
    ("schema", "made"),
    [
        (LENGTH, True),
        (array(NAME), True),
        (strings(MAIL, {"enum": ["a", "b"]}), True),
        ({"anyOf": [LENGTH, {"type": "null"}]}, True),
        ({"anyOf": [LENGTH, NAME, MAIL]}, True),
        ({"anyOf": [NAME, {"const": "Constantinople"}]}, False),
        ({"anyOf": [NAME, {"type": "string"}]}, False),
        ({"anyOf": [NAME, {"type": "string", "format": "uuid"}]}, False),
        ({"anyOf": [closed({"c": LENGTH}), closed({"c": {"const": "Constantinople"}})]}, False),
        ({"anyOf": [closed({"c": NAME}), closed({"c": LENGTH, "d": NAME})]}, True),
        ({"type": ["string", "null"], "pattern": "^[^a]{3}[a-z]+$"}, True),
        ({"pattern": "^[^a]{3}$"}, True),
        ({"$defs": {"n": NAME}, "$ref": "#/$defs/n"}, True),
        ({"$defs": {"n": NAME}, "$ref": "#/$defs/n", "maxLength": 3}, False),
        ({"allOf": [NAME, LENGTH]}, False),
        ({"type": "object", "patternProperties": {"^x": LENGTH}}, False),
        ({"type": "object", "additionalProperties": NAME, "required": ["p"]}, True),
        ({"type": "array", "items": {}, "description": '"pattern"'}, False),
    ],
)
def test_masks_are_made_here_where_it_is_known_what_a_string_may_be(
    schema: Any, made: bool
) -> None:
    assert (sum(walked(schema, seed, steps=12) for seed in range(10)) > 0) == made


def test_what_a_string_may_be_depends_on_what_was_before() -> None:
    """Both cases may begin; behind the kind, one is left."""
    cases = [
        closed({"k": {"const": kind}, "v": value}) for kind, value in (("a", NAME), ("b", MAIL))
    ]
    matcher = VOCABULARY.compile(json_grammar({"anyOf": cases}))
    for token in tokens('{"k": "a", "v": "x'):
        matcher.take(token)
    words = np.zeros(matcher.width, dtype=np.int32)
    assert matcher._strings is not None
    assert matcher._strings.fill(words)
    assert tokens("@")[0] not in set_bits(words) == by_itself(matcher)


def tokens(text: str) -> list[int]:
    """Single bytes."""
    return [int(VOCABULARY._others.spelled(bytes([byte]))[0]) for byte in text.encode()]


def test_marks_are_characters_as_others() -> None:
    """An answer may have them; masks are llguidance's then."""
    matcher = VOCABULARY.compile(json_grammar(array({"type": "string", "maxLength": 4})))
    for token in tokens(f'["{mark(0)}a{mark(3)}", "b'):
        assert token in allowed(matcher) == by_itself(matcher)
        matcher.take(token)
    assert not matcher.error
    assert allowed(matcher) == by_itself(matcher)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 3, "maxLength": 6},
        {"type": "string", "pattern": "^.{3,6}$"},
        {"anyOf": [closed({"c": LENGTH}), closed({"c": NAME, "d": LENGTH})]},
    ],
)
def test_marks_that_an_answer_has_are_no_marks(schema: Any) -> None:
    """The mark of a part at the beginning of a string, where the schema's own would be."""
    for number in range(5):
        matcher = VOCABULARY.compile(json_grammar(schema))
        begin = '{"c": "' if "anyOf" in schema else '"'
        for token in tokens(f"{begin}{mark(number)}"):
            assert token in allowed(matcher) == by_itself(matcher)
            matcher.take(token)
        assert allowed(matcher) == by_itself(matcher)


def test_half_characters_and_escapes_are_left_to_llguidance() -> None:
    matcher = VOCABULARY.compile(json_grammar({"type": "string", "maxLength": 6}))
    for token in tokens('"é\\n日\\u0001x"'):
        assert token in allowed(matcher) == by_itself(matcher)
        matcher.take(token)
    assert matcher.is_complete


def test_a_schema_with_marks_in_it_has_no_marks() -> None:
    for number in (0, MARKS - 1):
        text = json.dumps({"type": "string", "pattern": f"^{mark(number)}$"}, ensure_ascii=False)
        assert marked(text) is None
        assert marked(json.dumps(json.loads(text))) is None  # escaped
        assert marked(text.replace(mark(number), "a")) is not None


def test_more_patterns_than_marks_are_left_to_llguidance() -> None:
    many = closed({f"p{at}": {"type": "string", "maxLength": at} for at in range(MARKS)})
    assert marked(json.dumps(many)) is None


def test_a_vocabulary_without_some_bytes_has_llguidances_masks() -> None:
    data = json.loads(tokenizer().to_str())
    names = data["model"]["vocab"]
    names["<none>"] = names.pop("}")
    known = vocabulary(Tokenizer.from_str(json.dumps(data)), "<end>")
    matcher = known.compile(json_grammar(array(NAME)))
    assert allowed(matcher) == by_itself(matcher) != []


def test_walks_leave_a_client_what_the_lexer_may_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies share it; here the walks use it up, and an answer needs half of it."""
    walks = []

    def walk(matcher: Matcher, ends: list[int]) -> bool:
        walks.append(warm(matcher, ends))
        return walks[-1]

    monkeypatch.setattr("services.decode_worker.constraints.matcher.warm", walk)
    monkeypatch.setattr("services.decode_worker.constraints.matcher.MAX_LEXER_STATES", 50)
    matcher = VOCABULARY.compile(json_grammar({"type": "string", "pattern": "^[a-z]{2,40}x$"}))
    for token in tokens('"abcdefghijkl'):
        assert token in allowed(matcher)
        matcher.take(token)
    assert walks == [False]


def test_copies_go_their_own_way() -> None:
    matcher = VOCABULARY.compile(json_grammar(array(NAME)))
    for token in tokens('["ab'):
        matcher.take(token)
    other = matcher.copy()
    for token in tokens('", '):
        other.take(token)
    assert allowed(matcher) == by_itself(matcher) != allowed(other) == by_itself(other)


def test_another_kind_of_vocabulary() -> None:
    known = vocabulary(sentence_piece(), "<end>")
    assert sum(walked(array(NAME), seed, known=known) for seed in range(5)) > 10
