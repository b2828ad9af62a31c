"""Probabilities as OpenAI's JSON: nothing collides, bytes join to the text, offsets are right."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.tokenizer.token_table import TokenTable
from services.gateway.openai.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from tests.support.tokenizers import byte_level, sentence_piece

TABLES = {"byte-level": TokenTable(byte_level()), "sentence-piece": TokenTable(sentence_piece())}


def reported(table: TokenTable, token: int, *others: int) -> pb.TokenLogprob:
    text, token_bytes = table.shown(token)
    report = pb.TokenLogprob(token_id=token, logprob=-3.0, text=text, token_bytes=token_bytes)
    for rank, other in enumerate(others):
        text, token_bytes = table.shown(other)
        report.top.add(token_id=other, logprob=-rank, text=text, token_bytes=token_bytes)
    return report


def letters(tokenizer: Tokenizer, *names: str) -> list[int]:
    return [tokenizer.token_to_id(name) for name in names]


def byte_tokens(table: TokenTable, raw: bytes) -> list[int]:
    known = {table.bytes_of(token): token for token in range(table.tokenizer.get_vocab_size())}
    return [known[bytes([byte])] for byte in raw]


@given(ids=st.lists(st.integers(0, 300), max_size=12), kind=st.sampled_from(sorted(TABLES)))
def test_bytes_join_to_the_text(ids: list[int], kind: str) -> None:
    table = TABLES[kind]
    chat = chat_logprobs([reported(table, token) for token in ids])
    joined = b"".join(bytes(entry.bytes or ()) for entry in (chat.content if chat else ()))
    assert joined == b"".join(map(table.bytes_of, ids))


@given(text=st.text(st.sampled_from("sea é日🙂") | st.characters(codec="utf-8"), max_size=20))
def test_offsets_are_characters_of_the_text(text: str) -> None:
    table = TABLES["byte-level"]
    ids = table.tokenizer.encode(text).ids
    shown = completion_logprobs([reported(table, token) for token in ids], TextOffsets(7))
    ends = [len(text[: at + 1].encode()) for at in range(len(text))]
    for at, offset in enumerate(shown.text_offset if shown else ()):
        position = sum(len(table.bytes_of(token)) for token in ids[:at])
        assert offset == 7 + sum(end <= position for end in ends)


def test_parts_of_one_character_have_its_offset() -> None:
    table = TABLES["byte-level"]
    ids = table.tokenizer.encode("é🙂a").ids
    shown = completion_logprobs([reported(table, token) for token in ids], TextOffsets(0))
    assert shown is not None
    assert shown.text_offset == [0, 0, 1, 1, 1, 1, 2]
    assert shown.tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_five_parts_of_characters_are_five_entries() -> None:
    table = TABLES["byte-level"]
    parts = byte_tokens(table, b"\xf0\x9f\xaf\x82\x92")
    shown = completion_logprobs([reported(table, parts[0], *parts)], TextOffsets(0))
    assert shown is not None
    assert list(shown.top_logprobs[0]) == [
        f"bytes:\\x{byte:02x}" for byte in (0xF0, 0x9F, 0xAF, 0x82, 0x92)
    ]
    chat = chat_logprobs([reported(table, parts[0], *parts)])
    assert chat is not None
    assert [top.token for top in chat.content[0].top_logprobs][:2] == ["\\xf0", "\\x9f"]
    assert chat.content[0].bytes == [0xF0]


def test_tokens_of_one_text_stay_apart() -> None:
    """A letter and the token of its byte: the likelier has the text, as lm-eval's check for greedy
    tokens wants."""
    table = TABLES["sentence-piece"]
    letter, byte = letters(table.tokenizer, "a", "<0x61>")
    (top,) = completion_logprobs([reported(table, byte, letter)], TextOffsets(0)).top_logprobs  # type: ignore[union-attr]
    assert top == {"a": 0.0, f"token_id:{byte}": -3.0}
    (top,) = completion_logprobs([reported(table, byte, byte, letter)], TextOffsets(0)).top_logprobs  # type: ignore[union-attr]
    assert top == {"a": 0.0, f"token_id:{letter}": -1.0}


@pytest.mark.parametrize("kind", TABLES)
def test_blanks_belong_to_their_tokens(kind: str) -> None:
    table = TABLES[kind]
    ids = table.tokenizer.encode("qsea the sea").ids
    begin = [table.name(token) for token in ids].index("q") + 1
    tokens = [reported(table, token) for token in ids[begin:]]
    shown = completion_logprobs(tokens, TextOffsets(0))
    assert shown is not None
    assert "".join(shown.tokens) == "sea the sea"
    assert shown.text_offset == [len("".join(shown.tokens[:at])) for at in range(len(shown.tokens))]


def test_special_tokens_have_a_name_and_no_bytes() -> None:
    table = TABLES["byte-level"]
    (end,) = letters(table.tokenizer, "<end>")
    chat = chat_logprobs([reported(table, end, end)])
    assert chat is not None
    (entry,) = chat.content
    assert (entry.token, entry.bytes, entry.top_logprobs[0].bytes) == ("<end>", None, None)
    assert math.isclose(entry.logprob, -3.0)
