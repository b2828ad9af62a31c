"""A decode worker whose model folder is damaged ends with one line that names what is wrong."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import precast
from tests.support.models import config, write_model


def start(home: Path) -> "subprocess.CompletedProcess[str]":
    flags = ["--redis-url=redis://127.0.0.1:1/0", "--listen=127.0.0.1:0"]
    return precast("decode-worker", f"--home={home}", "--model=tiny", *flags)


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def damage_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config(**changes)))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: configure(folder, rope_theta=float("nan")), "rope_theta"),
        (lambda folder: configure(folder, num_hidden_layers=10**9), "num_hidden_layers"),
        (
            lambda folder: configure(folder, quantization_config={"quant_method": "hqq"}),
            "quantization_config ('hqq')",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\n"
            ),
            "a Git LFS pointer",
        ),
        (cut_weights, "weights can't be read"),
        (damage_header, "weights can't be read"),
        (lambda folder: configure(folder, num_hidden_layers=3), "model.layers.2."),
        (lambda folder: configure(folder, intermediate_size=96), "has shape"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    damage(write_model(tmp_path / "models" / "tiny"))
    done = start(tmp_path)
    assert done.returncode in (1, 2)
    said = [line for line in done.stderr.splitlines() if line.startswith("precast: ")]
    assert len(said) == 1 and named in said[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr
