"""Perplexity and first choices: right for exact weights, worse for coarse ones, the same twice."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from precast.errors import ConfigError
from precast.evaluation.perplexity import TEXT, evaluate, windows
from precast.models.precision import Precision
from tests.support.command import precast
from tests.support.models import write_model

WINDOW = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("home") / "models" / "tiny")


def test_exact_weights_have_the_perplexity_that_transformers_gives(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = TEXT.read_text()[:1000]
    batch = torch.stack(windows(folder, text, WINDOW))
    assert batch.shape == (len(text.encode()) // WINDOW, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        loss = model(batch, labels=batch).loss
    [score] = evaluate(folder, [Precision()], text, WINDOW)
    assert score.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert (score.perplexity_change, score.top1_agreement) == (0, 1)
    assert score.tokens == batch.shape[0] * (WINDOW - 1)


def test_coarser_formats_agree_less_and_results_repeat(folder: Path) -> None:
    precisions = [
        Precision(),
        Precision(quantization="q8_0", head_quantization="q8_0"),
        Precision(quantization="q4_0", head_quantization="q4_0"),
        Precision(kv_dtype="int8"),
    ]
    text = TEXT.read_text()[:2000]
    scores = list(evaluate(folder, precisions, text, WINDOW))
    assert scores == list(evaluate(folder, precisions, text, WINDOW))
    exact, fine, coarse, cache = (score.top1_agreement for score in scores)
    assert exact == 1 > fine > coarse
    assert coarse < cache < 1
    assert 0 < abs(scores[1].perplexity_change) < 0.05


def test_a_text_shorter_than_a_window_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="window = 64: the text has 5 tokens"):
        windows(folder, "short", WINDOW)
    with pytest.raises(ConfigError, match="window = 512 exceeds the model's 256 positions"):
        list(evaluate(folder, [Precision()], TEXT.read_text(), 512))


def precast_eval(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    home = folder.parent.parent
    return precast("eval", folder.name, "--home", home, *arguments, timeout_s=100)


def test_command_prints_every_combination(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT.read_text()[:600])
    arguments = ("--quantization", "none,q4_1", "--kv-dtype", "fp32,bf16", "--window", "64")
    done = precast_eval(folder, *arguments, "--text", str(text), "--json")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [(row["quantization"], row["head_quantization"], row["kv_dtype"]) for row in rows] == [
        ("none", "none", "fp32"),
        ("none", "none", "bf16"),
        ("q4_1", "q8_0", "fp32"),
        ("q4_1", "q8_0", "bf16"),
    ]
    assert rows[0]["top1_agreement"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quantization", "int3"), "--quantization: 'int3' is not one of: none, int8"),
        (("--text", "/no/such/file"), "/no/such/file"),
    ],
)
def test_a_wrong_flag_is_one_line(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    done = precast_eval(folder, *arguments)
    assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (2, True, 1)
