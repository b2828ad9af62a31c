"""Bytes of tokens, beside what the tokenizers themselves decode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders

from precast.tokenizer.token_table import TokenTable
from tests.support.tokenizers import byte_level, sentence_piece, word_piece


def with_decoder(decoder: decoders.Decoder | None) -> Tokenizer:
    tokenizer = sentence_piece()
    tokenizer.decoder = decoder
    return tokenizer


DECODERS = {
    "byte-level": byte_level(),
    "llama": sentence_piece(),
    "gemma": with_decoder(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "metaspace": with_decoder(decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])),
    "stripped": with_decoder(decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.Fuse()])),
}


@pytest.mark.parametrize("kind", DECODERS)
@given(text=st.text(st.sampled_from("sea th\n") | st.characters(codec="utf-8"), max_size=20))
def test_bytes_join_to_what_the_tokenizer_decodes(kind: str, text: str) -> None:
    tokenizer = DECODERS[kind]
    table = TokenTable(tokenizer)
    assert table.has_bytes
    ids = tokenizer.encode(f"q{text}").ids
    begin = next(at for at, token in enumerate(ids) if table.name(token) in ("q", "▁q"))
    joined = b"".join(map(table.bytes_of, ids[begin:])).decode("utf-8", "replace")
    assert joined.lstrip(" ") == tokenizer.decode(ids).lstrip(" ")


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_texts_that_depend_on_their_neighbours_are_known(decoder: decoders.Decoder | None) -> None:
    assert not TokenTable(with_decoder(decoder)).has_bytes


def test_every_byte_has_a_token_that_stands_for_it() -> None:
    for kind in ("byte-level", "llama"):
        table = TokenTable(DECODERS[kind])
        known = {table.bytes_of(token) for token in range(table.tokenizer.get_vocab_size())}
        assert {bytes([byte]) for byte in range(256)} <= known


def test_added_tokens_are_what_they_are_written_as() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("é → ▁", normalized=False)])
    tokenizer.add_special_tokens(["<|x|>"])
    table = TokenTable(tokenizer)
    plain, special = (tokenizer.token_to_id(token) for token in ("é → ▁", "<|x|>"))
    assert table.shown(plain) == ("é → ▁", "é → ▁".encode())
    assert table.shown(special) == ("<|x|>", None)
    assert table.bytes_of(special) == b""


def test_ids_beyond_the_vocabulary_have_nothing() -> None:
    assert TokenTable(word_piece()).shown(10**6) == ("", None)
