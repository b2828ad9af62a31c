"""Folders that are replaced while somebody reads them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from precast.system import held_folders as versions
from precast.system.held_folders import model_name, put_in_place, remove_unheld, replaced_folders

READER = """
import sys
from pathlib import Path
from precast.system.held_folders import held_folder
for _ in iter(sys.stdin.readline, ""):
    print((held_folder(Path(sys.argv[1])) / "content").read_text(), flush=True)
"""


@contextmanager
def reader(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "content").write_text(content)
    return path


@pytest.mark.parametrize("exchange", [True, False])
def test_a_reader_keeps_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a file system that can't
        monkeypatch.setattr(versions, "_exchange", lambda _one, _other: False)
    target = folder(tmp_path / "tiny", "first")
    with reader(target) as process:
        assert ask(process) == "first"
        put_in_place(folder(tmp_path / ".partial-tiny", "second"), target)
        remove_unheld(tmp_path)
        assert ask(process) == "first"
        assert (target / "content").read_text() == "second"
        [old] = replaced_folders(tmp_path, "tiny")
        assert model_name(old) == "tiny"
    remove_unheld(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_that_nobody_reads_is_gone_at_once(tmp_path: Path) -> None:
    target = folder(tmp_path / "a-b", "first")
    put_in_place(folder(tmp_path / "new", "second"), target)
    assert [model_name(path) for path in replaced_folders(tmp_path, "a-b")] == ["a-b"]
    assert replaced_folders(tmp_path, "a") == []
    remove_unheld(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a-b"]


def test_what_is_not_there_is_no_matter(tmp_path: Path) -> None:
    assert versions.held_folder(tmp_path / "none") == tmp_path / "none"
    put_in_place(folder(tmp_path / "new", "first"), tmp_path / "tiny")
    assert (tmp_path / "tiny" / "content").read_text() == "first"
