"""Tokenizers out of GGUF files give the ids that llama.cpp (b11549) gives, byte for byte.

The tables in tests/data were written with it. Left out of them: combining marks for "tekken" and
"gpt-4o", and U+2003 before a blank for "deepseek-coder", where it differs from the models' own
tokenizers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.tokenizer import build_tokenizer, read_vocabulary
from precast.models.importing.importer import find_built_in
from tests.support.gguf_files import DATA, byte_level, sentencepiece, write_gguf

WITHOUT_PREFIX = {
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": True,
}


def read(path: Path) -> Tokenizer:
    file = GgufFile(path)
    return build_tokenizer(file, read_vocabulary(file))


def vocabulary(name: str) -> dict[str, Any]:
    if name.startswith("sentencepiece"):
        return sentencepiece() | (WITHOUT_PREFIX if name.endswith("without prefix") else {})
    return byte_level() | {"tokenizer.ggml.pre": name}


def table(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text("utf-8"))
    return content


@pytest.mark.parametrize("name", table("gguf_tokens")["ids"])
def test_ids_of_each_kind_of_vocabulary(tmp_path: Path, name: str) -> None:
    expected = table("gguf_tokens")
    tokenizer = read(write_gguf(tmp_path / "x.gguf", vocabulary=vocabulary(name)))
    for text, ids in zip(expected["texts"], expected["ids"][name], strict=True):
        assert tokenizer.encode(text).ids == ids, repr(text)


@pytest.mark.parametrize("name", table("sentencepiece_tokens")["ids"])
def test_ids_of_sentencepiece_on_many_texts(tmp_path: Path, name: str) -> None:
    tokenizer = read(write_gguf(tmp_path / "x.gguf", vocabulary=vocabulary(name)))
    texts, ids = table("smollm2_tokens")["texts"], table("sentencepiece_tokens")["ids"][name]
    assert len(texts) >= 729
    for text, expected in zip(texts, ids, strict=True):
        assert tokenizer.encode(text).ids == expected, repr(text)


def test_ids_of_the_demo_model() -> None:
    expected = table("smollm2_tokens")
    tokenizer = read(find_built_in("smollm2-135m-instruct"))
    pairs = zip(expected["texts"], expected["ids"]["smollm2-135m-instruct"], strict=True)
    assert len(expected["texts"]) >= 729
    for text, ids in pairs:
        assert tokenizer.encode(text).ids == ids, repr(text)
    assert tokenizer.encode("x =  5").ids[-2:] == [256, 37]


@pytest.mark.parametrize("name", ["smollm", "sentencepiece", "sentencepiece without prefix"])
def test_texts_come_back(tmp_path: Path, name: str) -> None:
    tokenizer = read(write_gguf(tmp_path / "x.gguf", vocabulary=vocabulary(name)))
    for text in (" leading blank", "  two", "naïve 🙂 日本語\n\n\tx", "x =  5", ""):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_without_scores_merges_or_a_known_name(tmp_path: Path) -> None:
    path, bpe, spm = tmp_path / "x.gguf", byte_level(), sentencepiece()

    def refused(words: dict[str, Any], said: str, kind: type[Exception] = ModelCorrupt) -> None:
        with pytest.raises(kind, match=said) as failure:
            read(write_gguf(path, vocabulary=words))
        assert "\n" not in str(failure.value)

    refused(bpe | {"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing")
    refused(spm | {"tokenizer.ggml.scores": None}, r"tokenizer\.ggml\.scores is missing")
    refused(bpe | {"tokenizer.ggml.merges": ["ab"]}, "'ab' is not a pair")
    refused(bpe | {"tokenizer.ggml.merges": ["Q Q"]}, "not consistent: .*QQ")
    refused(bpe | {"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries for")
    refused(bpe | {"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000, but")
    refused(bpe | {"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokens 0 and 2 are both 'a'")
    refused(bpe | {"tokenizer.ggml.tokens": "abc"}, "tokens is not an array of strings")
    refused(bpe | {"tokenizer.ggml.model": None}, "no vocabulary")
    refused(bpe | {"tokenizer.ggml.model": "bert"}, "'bert' is not", UnsupportedArchitecture)
    refused(
        bpe | {"tokenizer.ggml.pre": "kimi-k2"}, "'kimi-k2' is not one of", UnsupportedArchitecture
    )
    refused(
        bpe | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
        "bos_token_id is missing",
    )
