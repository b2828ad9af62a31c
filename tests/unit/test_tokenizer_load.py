"""Tokenizers as they are read: whole prompts, whatever the file was saved with."""

from pathlib import Path

import pytest

from precast.errors import ModelCorrupt
from precast.tokenizer.digest import tokenizer_digest
from precast.tokenizer.load import load_tokenizer
from tests.support.models import write_model


def test_settings_of_a_training_are_off(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    plain = load_tokenizer(folder)
    texts = ["a longer text than sixteen tokens", "short"]
    expected = [encoding.ids for encoding in plain.encode_batch(texts)]
    tuned = load_tokenizer(folder)
    tuned.enable_truncation(max_length=16)
    tuned.enable_padding(length=64, pad_id=7)
    tuned.save(str(folder / "tokenizer.json"))
    assert '"padding": {' in (folder / "tokenizer.json").read_text()
    loaded = load_tokenizer(folder)
    assert [encoding.ids for encoding in loaded.encode_batch(texts)] == expected
    assert [loaded.encode(text).ids for text in texts] == expected
    assert loaded.truncation is None and loaded.padding is None


def test_a_digest_is_of_contents_and_nothing_else(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    digest = tokenizer_digest(one)
    assert len(digest) == 64 and tokenizer_digest(other) == digest
    (one / "config.json").write_text("{}")
    assert tokenizer_digest(one) == digest
    seen = {digest}
    for change in (
        lambda: (one / "chat_template.jinja").write_text(""),
        lambda: (one / "chat_template.jinja").write_text("{{ messages }}"),
        lambda: (one / "tokenizer_config.json").write_text("{}"),
        lambda: (one / "tokenizer.json").write_text("{}"),
        lambda: (one / "tokenizer.json").unlink(),
    ):
        change()
        seen.add(tokenizer_digest(one))
    assert len(seen) == 6
    (one / "tokenizer.json").mkdir()
    with pytest.raises(ModelCorrupt, match=r"tokenizer\.json"):
        tokenizer_digest(one)
