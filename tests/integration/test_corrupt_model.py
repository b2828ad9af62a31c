"""A decode worker whose model folder is damaged ends with one line that names what is wrong."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from tests.support.command import precast
from tests.support.decode_worker import decode_worker, eventually
from tests.support.models import config, tensors, write_model


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


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: configure(folder, rms_norm_eps=1e-3),
        lambda folder: save_file(tensors(seed=1), folder / "model.safetensors"),
    ],
    ids=["config", "weights"],
)
def test_files_that_change_under_a_worker_end_it_with_its_ranks(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """Ranks that start again would go on with other weights than those of the KV cache."""
    folder = write_model(tmp_path / "models" / "tiny")
    with decode_worker(tmp_path, "redis://127.0.0.1:1/0", "tiny", batch_sizes="1") as worker:
        [rank] = worker.ranks()
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes())  # the same bytes are the same files
        os.kill(rank, signal.SIGKILL)
        eventually(lambda: worker.ranks() not in ([], [rank]) and worker.is_ready())
        change(folder)
        os.kill(worker.ranks()[0], signal.SIGKILL)
        assert worker.process.wait(30) == 1
    assert worker.log.read_text().splitlines()[-1] == (
        "precast: tiny: the model's files have changed since the worker began to load them"
    )
