"""The demo model's import against transformers reading the same GGUF file directly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from precast.models.config import load_config
from precast.ops.native import start_threads
from precast.tokenizer.load import load_tokenizer
from tests.support.architectures import SEQUENCES, forward, load

pytestmark = pytest.mark.timeout(300)
TEXTS = (
    "The capital of France is",
    "  two  spaces\tand\n\nlines",
    "naïve café, 日本語, 🙂 and 12345.678",
    "def f(x):\n    return x**2  # square",
    "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
)


def test_logits_are_those_of_the_gguf_file(demo_model: Path, transformers_model: Any) -> None:
    start_threads((-1, -1))
    for ids, ours in zip(SEQUENCES, forward(load(demo_model)), strict=True):
        with torch.inference_mode():
            expected = transformers_model(ids[None]).logits[0]
        largest = float(expected.abs().max())
        assert largest > 1.0
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * largest)


def test_texts_survive_the_tokenizer(demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    # digits are tokens of their own, and special tokens one id each
    assert len(tokenizer.encode("12345").ids) == 5
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_the_chat_template_renders_and_ends_where_the_model_ends(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert load_config(demo_model).eos_token_ids == (2,)


def test_the_folder_is_complete_and_readable_by_others(demo_model: Path) -> None:
    assert {path.name for path in demo_model.iterdir()} >= {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.gguf",
        "model.gguf.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in demo_model.iterdir())
    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
