"""Text as tokens come: whole characters, held-back stop strings, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from precast.tokenizer.detokenizer import Detokenizer

PROMPT = "say:"


def byte_level() -> Tokenizer:
    """Byte-level BPE, as SmolLM2 and Llama 3 have: a character may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello there, the end is near the sea"] * 20, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece-like, as Llama 2 has: a space belongs to the token after it."""
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    for letter in "▁abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "metaspace": metaspace()}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def make(tokenizer: Tokenizer, *stops: str) -> Detokenizer:
    return Detokenizer(tokenizer, tokenizer.encode(PROMPT).ids, stops)


def stream(tokenizer: Tokenizer, text: str, *stops: str) -> tuple[list[str], bool]:
    """What each token gives out, the flush last, and whether a stop string ended it."""
    detokenizer = make(tokenizer, *stops)
    pieces = []
    for token in tokenizer.encode(text).ids:
        piece, stopped = detokenizer.push([token])
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, detokenizer.flush()], False


@pytest.mark.parametrize(
    "text", ["hello there", "é", "naïve café", "日本語", "🙂👩‍👩‍👧 ok", " lead", "a\n\nb"]
)
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces, stopped = stream(tokenizer, text)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text).ids)
    assert not stopped


def test_half_a_character_is_never_given_out(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, "a🙂b")
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_stays_incomplete_comes_with_the_flush(tokenizer: Tokenizer) -> None:
    detokenizer = make(tokenizer)
    given_out = "".join(detokenizer.push([t])[0] for t in tokenizer.encode("🙂").ids[:2])
    assert given_out == ""
    assert "\ufffd" in detokenizer.flush()


def test_a_stop_string_across_tokens_is_cut_off(tokenizer: Tokenizer) -> None:
    pieces, stopped = stream(tokenizer, "hello there the end is near", "the end", "never")
    assert stopped
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode("hello there ").ids)


def test_the_earliest_stop_string_wins(tokenizer: Tokenizer) -> None:
    detokenizer = make(tokenizer, "sea", "near")
    text, stopped = detokenizer.push(tokenizer.encode("near the sea").ids)
    assert (text.strip(), stopped) == ("", True)


def test_what_only_looked_like_a_stop_string_is_given_out(tokenizer: Tokenizer) -> None:
    pieces, stopped = stream(tokenizer, "the en route", "the end")
    assert not stopped
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode("the en route").ids)
    pieces, stopped = stream(tokenizer, "the en", "the end")
    assert not stopped
    assert "".join(pieces).endswith("the en")


def test_special_tokens_have_no_text() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    end = tokenizer.token_to_id("<end>")
    detokenizer = make(tokenizer)
    assert detokenizer.push([end]) == ("", False)
    assert detokenizer.piece(end) == "<end>"
    assert detokenizer.push(tokenizer.encode("sea").ids)[0] == "sea"


@given(text=st.text(min_size=1, max_size=40), stop=st.text(min_size=1, max_size=3))
def test_any_text_and_any_stop_string(text: str, stop: str) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    whole = tokenizer.decode(tokenizer.encode(text).ids)
    pieces, stopped = stream(tokenizer, text, stop)
    assert stopped == (stop in whole)
    assert "".join(pieces) == (whole[: whole.index(stop)] if stopped else whole)
