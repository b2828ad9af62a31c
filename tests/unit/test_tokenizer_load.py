"""Tokenizers as they are read: whole prompts, whatever the file was saved with."""

from pathlib import Path

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
