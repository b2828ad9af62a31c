"""Text as tokens come: whole characters, held-back stop strings, nothing lost."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from precast.tokenizer.detokenizer import Detokenizer
from precast.tokenizer.stop_strings import StopStrings
from precast.tokenizer.token_table import TokenTable
from tests.support.tokenizers import byte_level, sentence_piece, word_piece

PROMPT = "say:"


TOKENIZERS = {
    "byte-level": byte_level(),
    "sentence-piece": sentence_piece(),
    "word-piece": word_piece(),
}
TABLES = {name: TokenTable(tokenizer) for name, tokenizer in TOKENIZERS.items()}
BYTES = ("byte-level", "sentence-piece")
"""Tokenizers that can write any text."""


@pytest.fixture(params=BYTES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(name: str) -> Tokenizer:
    return TOKENIZERS[name]


def make(name: str, *stops: str) -> Detokenizer:
    return Detokenizer(TABLES[name], TOKENIZERS[name].encode(PROMPT).ids, stops)


def test_the_stop_string_that_was_hit_is_known(name: str) -> None:
    detokenizer = make(name, "other", "ell", "hell")
    assert stream_ids(detokenizer, continued(name, "hello there"))[1]
    assert detokenizer.stop_string == "hell"


def continued(name: str, text: str) -> list[int]:
    """Tokens of a text that follows the prompt."""
    encoded = TOKENIZERS[name].encode(f"q{text}", add_special_tokens=False)
    return list(encoded.ids[encoded.tokens.index("q") + 1 :])


def stream(name: str, text: str, *stops: str) -> tuple[list[str], bool]:
    """What each token gives out, the flush last, and whether a stop string ended it."""
    return stream_ids(make(name, *stops), continued(name, text))


def stream_ids(detokenizer: Detokenizer, ids: list[int]) -> tuple[list[str], bool]:
    pieces = []
    for token in ids:
        piece, stopped = detokenizer.push_token(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    return [*pieces, detokenizer.flush()], False


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first; the longest of several."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@pytest.mark.parametrize(
    "text", ["hello there", "é", "naïve café", "日本語", "🙂👩‍👩‍👧 ok", " lead", "a\n\nb", "   "]
)
def test_pieces_add_up_to_the_text(name: str, text: str) -> None:
    pieces, stopped = stream(name, text)
    assert "".join(pieces) == text
    assert not stopped


def test_words_of_a_tokenizer_without_bytes_come_with_their_blanks() -> None:
    assert not TABLES["word-piece"].has_bytes
    ids = TOKENIZERS["word-piece"].encode("hello there sea").ids
    pieces, _ = stream_ids(make("word-piece"), ids)
    assert pieces == [" hello", " the", "re", " sea", ""]


def test_half_a_character_is_never_given_out(name: str) -> None:
    pieces, _ = stream(name, "a🙂b")
    assert pieces[1:5] == ["", "", "", "🙂"]


def test_a_character_that_stays_incomplete_comes_with_the_flush(name: str) -> None:
    detokenizer = make(name)
    given_out = "".join(detokenizer.push([t])[0] for t in continued(name, "🙂")[:2])
    assert given_out == ""
    assert detokenizer.flush() == "\ufffd"


def test_a_stop_string_across_tokens_is_cut_off(name: str) -> None:
    pieces, stopped = stream(name, "hello there the end is near", "the end", "never")
    assert stopped
    assert "".join(pieces) == "hello there "


def test_the_stop_string_that_is_complete_first_wins(name: str) -> None:
    detokenizer = make(name, "sea", "near")
    assert detokenizer.push(continued(name, "near the sea")) == ("", True)


def test_what_only_looked_like_a_stop_string_is_given_out(name: str) -> None:
    for text in ("the en route", "the en", "the the th"):
        pieces, stopped = stream(name, text, "the end", "the the the")
        assert not stopped
        assert "".join(pieces) == text


def test_special_tokens_have_no_text(name: str) -> None:
    end = TOKENIZERS[name].token_to_id("<end>")
    detokenizer = make(name)
    assert detokenizer.push([end]) == ("", False)
    assert detokenizer.push(continued(name, "sea"))[0] == "sea"


def test_special_tokens_are_text_where_they_are_shown(name: str) -> None:
    end = TOKENIZERS[name].token_to_id("<end>")
    detokenizer = Detokenizer(TABLES[name], [end], ["a<end>x"], show_special_tokens=True)
    ids = [*continued(name, "sea"), end, end, *continued(name, "a"), end, *continued(name, "x")]
    pieces, stopped = stream_ids(detokenizer, ids)
    assert ("".join(pieces), stopped) == ("sea<end><end>", True)
    assert TABLES[name].shown(end) == ("<end>", None)
    assert TABLES[name].shown(end, special=True) == ("<end>", b"<end>")


def test_special_tokens_of_a_tokenizer_without_bytes_can_be_shown() -> None:
    table, tokenizer = TABLES["word-piece"], TOKENIZERS["word-piece"]
    detokenizer = Detokenizer(table, [], show_special_tokens=True)
    ids = [tokenizer.token_to_id(token) for token in ("hello", "<end>", "sea")]
    pieces, _ = stream_ids(detokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert "<end>" in "".join(pieces)


def test_a_stop_string_can_be_kept(name: str) -> None:
    stops = ("the end", "end")
    detokenizer = Detokenizer(TABLES[name], [], stops, keep_stop_string=True)
    pieces, stopped = stream_ids(detokenizer, continued(name, "hello there the end is near"))
    assert ("".join(pieces), stopped) == ("hello there the end", True)


def test_a_stop_string_may_not_begin_too_early(name: str) -> None:
    detokenizer = make(name, "abab")
    ids = continued(name, "ababababx")
    early = [detokenizer.push_token(token, may_stop=False) for token in ids[:3]]
    assert early == [("a", False), ("b", False), ("a", False)]
    pieces, stopped = stream_ids(detokenizer, ids[3:])
    assert ("".join(pieces), stopped) == ("b", True)


@pytest.mark.parametrize("name", BYTES)
@example(text="abcabcabd", stops=["abcabd", "cabc"])
@given(
    text=st.text(st.sampled_from("ab \n🙂é日") | st.characters(codec="utf-8"), max_size=40),
    stops=st.lists(st.text("ab 🙂é日", min_size=1, max_size=6), max_size=64),
)
def test_any_text_and_any_stop_strings(name: str, text: str, stops: list[str]) -> None:
    """Pieces join to the text up to the first stop string, and never end within a character."""
    pieces, stopped = stream(name, text, *stops)
    assert ("".join(pieces), stopped) == cut(text, stops)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", BYTES)
@given(data=st.data())
def test_any_tokens_split_anyhow(name: str, data: st.DataObject) -> None:
    """Also tokens that are no text together: the text is that of the joined bytes."""
    table = TABLES[name]
    ids = data.draw(st.lists(st.integers(0, table.tokenizer.get_vocab_size()), max_size=30))
    stops = data.draw(st.lists(st.text("ab \ufffd", min_size=1, max_size=3), max_size=4))
    whole = b"".join(map(table.bytes_of, ids)).decode("utf-8", "replace")
    at = data.draw(st.integers(0, len(ids)))
    detokenizer = make(name, *stops)
    text, stopped = detokenizer.push(ids[:at])
    if not stopped:
        more, stopped = detokenizer.push(ids[at:])
        text += more if stopped else more + detokenizer.flush()
    assert text == cut(whole, stops)[0]


class Counting:
    """A tokenizer that counts the tokens it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        text: str = self._tokenizer.decode(ids, **options)
        return text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_special_token_again_and_again_costs_the_same_each_time(name: str) -> None:
    counting: Any = Counting(TOKENIZERS[name])
    detokenizer = Detokenizer(TokenTable(counting), [0] * 10)
    end, word = (counting.token_to_id(token) for token in ("<end>", "sea"))
    costs = []
    for _ in range(3):
        counting.decoded = 0
        for _ in range(1000):
            detokenizer.push([end])
        detokenizer.push([word])
        costs.append(counting.decoded)
    assert max(costs) <= 16
    assert detokenizer.push([word])[0].strip() == "sea"


def test_the_table_asks_once_for_each_token() -> None:
    counting: Any = Counting(TOKENIZERS["word-piece"])
    table = TokenTable(counting)
    for _ in range(3):
        assert table.bytes_of(counting.token_to_id("##re")) == b"re"
    assert counting.decoded <= 3


def test_stop_strings_cost_what_the_text_is_long() -> None:
    """Counted in steps of the automata: two for each character and string at the most, also where
    long strings nearly match all the time."""
    stops = StopStrings([("a" * size) + "b" for size in range(400, 464)])
    steps = 0
    for automaton in stops._automata:
        original = automaton._step

        def counted(letter: str, step: Any = original) -> None:
            nonlocal steps
            steps += 1
            step(letter)

        automaton._step = counted  # type: ignore[method-assign]
    for _ in range(100):
        assert stops.feed("aaaaa") is None
    assert steps <= 64 * 500
    assert stops.begun == 463
    assert all(len(automaton._table) <= 501 for automaton in stops._automata)


def test_a_long_stop_string_costs_no_memory_before_it_matches() -> None:
    stops = StopStrings(["ab" * 1_000_000])
    assert stops.feed("a" + "b" * 1000) is None
    assert sum(len(automaton._table) for automaton in stops._automata) <= 3
