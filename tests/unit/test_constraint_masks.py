"""What masks let through: what the grammar allows, and nothing else."""

import json
import random
import re
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from precast.tokenizer.detokenizer import Detokenizer
from precast.tokenizer.token_table import TokenTable
from services.decode_worker.constraints.grammar import Grammar
from services.decode_worker.constraints.trial import trial
from tests.support import models
from tests.support.constraints import accepts, allowed, json_grammar, vocabulary
from tests.support.json_schemas import CASES, UNSUPPORTED, SchemaCase
from tests.support.tokenizers import byte_level, sentence_piece, word_piece

BYTES = models._tokenizer()
"""Each token is a byte."""
TOKENIZERS = {"bytes": (BYTES, "<eos>"), "byte-level": (byte_level(), "<end>")}
VOCABULARIES = {name: vocabulary(*each) for name, each in TOKENIZERS.items()}
GRAMMARS = (
    Grammar(kind="regex", text="(ab|a)*c{2,3}"),
    Grammar(kind="regex", text="[^x]{0,4}é?🙂"),
    Grammar(kind="lark", text='start: item ("," item)*\nitem: /[a-z]+/ | "(" start ")"'),
    json_grammar({"type": "array", "items": {"type": "integer", "minimum": -3}, "maxItems": 3}),
    json_grammar({"enum": ["a", "ab", 1, None]}),
)


def tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_schema_allows_what_it_says(name: str, case: SchemaCase) -> None:
    tokenizer, _ = TOKENIZERS[name]
    matcher = VOCABULARIES[name].compile(json_grammar(case.schema))
    assert not matcher.error
    assert not matcher.warnings
    for value in case.valid:
        for indent in (None, 2):
            text = json.dumps(value, ensure_ascii=False, indent=indent)
            assert accepts(matcher, tokens(tokenizer, text)), text
    for value in case.invalid:
        text = json.dumps(value, ensure_ascii=False)
        assert not accepts(matcher, tokens(tokenizer, text)), text


@pytest.mark.parametrize(("keyword", "schema"), UNSUPPORTED, ids=[name for name, _ in UNSUPPORTED])
def test_what_can_not_be_held_to_is_refused_by_name(keyword: str, schema: Any) -> None:
    found = trial(VOCABULARIES["bytes"], json_grammar(schema))
    named = keyword in found or found == ""
    assert named, found
    if not found:  # held to after all: then it has to be
        matcher = VOCABULARIES["bytes"].compile(json_grammar(schema))
        wrong = {"minProperties": '{"a": 1}', "maxProperties": '{"a": 1, "b": 1, "c": 1}'}[keyword]
        assert not accepts(matcher, tokens(BYTES, wrong))


def test_a_schema_can_not_ask_for_leniency() -> None:
    schema = {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}
    assert "uniqueItems" in trial(VOCABULARIES["bytes"], json_grammar(schema))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(GRAMMARS), st.integers(0, 2**32), st.integers(0, 12))
def test_masks_are_what_the_grammar_takes(grammar: Grammar, seed: int, steps: int) -> None:
    """Tokens of the vocabulary, behind any allowed beginning."""
    matcher = VOCABULARIES["bytes"].compile(grammar)
    draw = random.Random(seed)
    for _ in range(steps):
        matcher.take(draw.choice(allowed(matcher)))
        if matcher.is_complete:
            return
    may = set(allowed(matcher))
    for token in may.union(draw.sample(range(BYTES.get_vocab_size()), 40)):
        other = matcher.copy()
        other.take(token)
        assert (token in may) == (not other.error), token
    assert (BYTES.token_to_id("<eos>") in may) == matcher.may_end


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(GRAMMARS), st.integers(0, 2**32))
def test_masks_of_long_tokens_allow_nothing_wrong(grammar: Grammar, seed: int) -> None:
    matcher = VOCABULARIES["byte-level"].compile(grammar)
    draw = random.Random(seed)
    for _ in range(12):
        may = allowed(matcher)
        for token in may:
            other = matcher.copy()
            other.take(token)
            assert not other.error
        matcher.take(draw.choice(may))
        if matcher.is_complete:
            return


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(CASES), st.integers(0, 2**32))
def test_whatever_ends_is_valid(case: SchemaCase, seed: int) -> None:
    """Tokens at random, the end as soon as there may be one."""
    matcher = VOCABULARIES["byte-level"].compile(json_grammar(case.schema))
    tokenizer, end = TOKENIZERS["byte-level"]
    draw, output = random.Random(seed), []
    for _ in range(200):
        if matcher.may_end and (matcher.is_complete or draw.random() < 0.5):
            assert matcher.is_complete or tokenizer.token_to_id(end) in allowed(matcher)
            text = tokenizer.decode(output)
            value = json.loads(text, parse_float=lambda number: min(float(number), 1e300))
            check = jsonschema_rs.validator_for(case.schema, validate_formats=True)
            assert check.is_valid(value), value
            return
        output.append(draw.choice(allowed(matcher)))
        matcher.take(output[-1])


def test_formats_of_dates_are_strict_wherever_they_are() -> None:
    """And where "format" is a name or a value, it stays one."""
    day = {"type": "string", "format": "date"}
    schema = {
        "$defs": {"format": day},
        "type": "object",
        "properties": {
            "format": {"$ref": "#/$defs/format"},
            "const": {"type": "array", "items": day, "maxItems": 1},
            "enum": {"enum": [{"format": "date"}]},
            "at": {"anyOf": [{"type": "string", "format": "time"}, {"const": {"format": "date"}}]},
        },
        "required": ["format", "const", "enum", "at"],
    }
    matcher = VOCABULARIES["bytes"].compile(json_grammar(schema))
    assert not matcher.error

    def takes(a: str, b: str, at: object) -> bool:
        value = {"format": a, "const": [b], "enum": {"format": "date"}, "at": at}
        return accepts(matcher, tokens(BYTES, json.dumps(value)))

    assert takes("2024-02-29", "2000-02-29", "10:59:59Z")
    assert takes("2026-12-31", "2026-02-28", {"format": "date"})
    assert not takes("2026-02-29", "2000-02-29", "10:59:59Z")
    assert not takes("2024-02-29", "1900-02-29", "10:59:59Z")
    assert not takes("2024-02-29", "2000-02-29", "10:59:60Z")


def test_an_output_can_not_be_blanks_for_ever() -> None:
    matcher = VOCABULARIES["bytes"].compile(json_grammar({"type": "object"}))
    matcher.take(BYTES.token_to_id("{"))
    blanks = {token for letter in " \n\t" for token in tokens(BYTES, letter)}
    for _ in range(100):
        may = blanks.intersection(allowed(matcher))
        if not may:
            return
        matcher.take(min(may))
    raise AssertionError("a hundred blanks in a row")


def test_a_complete_output_takes_nothing_more() -> None:
    matcher = VOCABULARIES["bytes"].compile(Grammar(kind="regex", text="ab"))
    for token in tokens(BYTES, "ab"):
        assert not matcher.is_complete
        matcher.take(token)
    assert matcher.is_complete
    matcher.take(tokens(BYTES, "c")[0])
    assert (matcher.is_complete, matcher.error) == (True, "")


def test_a_wrong_token_is_an_error_that_stays() -> None:
    matcher = VOCABULARIES["bytes"].compile(Grammar(kind="regex", text="ab"))
    matcher.take(tokens(BYTES, "b")[0])
    assert matcher.error
    assert not matcher.is_complete
    matcher.take(tokens(BYTES, "a")[0])
    assert matcher.error


def test_a_mask_of_another_size_is_refused() -> None:
    matcher = VOCABULARIES["bytes"].compile(Grammar(kind="regex", text="ab"))
    with pytest.raises(ValueError, match="a mask of"):
        matcher.fill(np.zeros(matcher.width + 1, dtype=np.int32))


def test_a_vocabulary_that_is_padded() -> None:
    """Models have more rows of logits than their tokenizers have tokens."""
    padded = vocabulary(BYTES, "<eos>", 300)
    assert padded.width == 10
    assert max(allowed(padded.compile(Grammar(kind="regex", text="(?s:.*)")))) < 257


def test_blanks_of_tokens_are_those_of_the_text() -> None:
    """Where the first token of a text would lose its blank: an output goes on behind its prompt."""
    tokenizer = sentence_piece()
    known, table = vocabulary(tokenizer, "<end>"), TokenTable(tokenizer)
    matcher = known.compile(Grammar(kind="regex", text="( the| sea)[a-z ]{3}é"))
    for seed in range(20):
        output, here, draw = list[int](), matcher.copy(), random.Random(seed)
        while not here.is_complete:
            output.append(draw.choice(allowed(here)))
            here.take(output[-1])
        detokenizer = Detokenizer(table, tokenizer.encode("say").ids)
        text = detokenizer.push(output)[0] + detokenizer.flush()
        assert re.fullmatch("( the| sea)[a-z ]{3}é", text)


def test_a_tokenizer_whose_tokens_depend_on_each_other_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder"):
        vocabulary(word_piece(), "<end>")


def test_bytes_of_tokens_are_those_of_the_text() -> None:
    for tokenizer, end in (*TOKENIZERS.values(), (sentence_piece(), "<end>")):
        known, table = vocabulary(tokenizer, end), TokenTable(tokenizer)
        for token in range(tokenizer.get_vocab_size()):
            # 0xff marks special tokens there; no text has it
            if not table.is_special(token) and table.bytes_of(token) != b"\xff":
                assert known.bytes_of(token) == table.bytes_of(token)
