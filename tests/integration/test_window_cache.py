"""A cache that keeps windows gives the tokens that transformers gives, and an unbounded cache's
bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from precast.models.precision import KvDtype
from precast.ops import native
from tests.support.architectures import VOCABULARY, write_model
from tests.support.scheduled_model import CONTEXT, ScheduledModel

BLOCKS = 128
WINDOW_BLOCKS = 24
"""Fewer than four contexts have, more than four windows."""
TOKENS = 24
LENGTHS = {"long": 330, "middle": 130, "short": 40}


@pytest.fixture(scope="module", params=["gemma3", "gpt_oss", "mistral_window"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return write_model(tmp_path_factory.mktemp(name), name, positions=CONTEXT)


def prompts() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        for name, length in LENGTHS.items()
    }


def served(folder: Path, *, chunk: int, windows: int, kv_dtype: KvDtype) -> ScheduledModel:
    return ScheduledModel(
        folder, blocks=BLOCKS, window_blocks=windows, chunk=chunk, kv_dtype=kv_dtype
    )


def logits(model: ScheduledModel, asked: dict[str, list[int]]) -> dict[str, Tensor]:
    return {one.request_id: rows for one, rows in model.run(asked, TOKENS)}


def test_tokens_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    native.start_threads((-1, -1))
    model = served(folder, chunk=96, windows=WINDOW_BLOCKS, kv_dtype="fp32")
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    for one, rows in model.run(prompts(), TOKENS):
        whole = torch.tensor([[*one.prompt, *one.output[:-1]]])
        with torch.inference_mode():
            expected = reference(whole).logits[0, len(one.prompt) - 1 :]
        assert float((rows - expected).abs().max() / expected.abs().max()) < 1e-4
        assert one.output == expected.argmax(-1).tolist()


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_bits_are_those_of_an_unbounded_cache(folder: Path, kv_dtype: KvDtype) -> None:
    """In chunks longer than the window and shorter ones, beside others, behind a prefix of another
    request's, and after their blocks were taken from them."""
    native.start_threads((-1, -1))
    asked = prompts()
    expected = logits(served(folder, chunk=CONTEXT, windows=0, kv_dtype=kv_dtype), asked)
    windows = served(folder, chunk=100, windows=WINDOW_BLOCKS, kv_dtype=kv_dtype)
    hits = {f"{name} again": prompt for name, prompt in asked.items()}
    found = logits(windows, asked)
    again = windows.run(hits, TOKENS)
    assert any(one.cached >= 64 for one, _ in again)
    found |= {one.request_id: rows for one, rows in again}
    for name, rows in found.items():
        assert torch.equal(rows, expected[name.removesuffix(" again")]), name
    assert windows.repeats > TOKENS
    crowded = served(folder, chunk=20, windows=11, kv_dtype=kv_dtype)
    for name, rows in logits(crowded, asked).items():
        assert torch.equal(rows, expected[name]), name
