"""What was verified is what ranks load, whatever becomes of the file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from precast.errors import ArtifactRejected
from precast.graphs.artifacts.sealed import seal_graph
from tests.support.artifacts import graph_file, manifest_for


def test_a_child_reads_what_was_hashed(tmp_path: Path) -> None:
    path = graph_file(tmp_path)
    content = path.read_bytes()
    sealed = seal_graph(path, manifest_for(content))
    path.write_bytes(b"other bytes")
    program = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    for _ in range(2):  # ranks that are started again read it again
        read = subprocess.run(
            [sys.executable, "-c", program, sealed.path], capture_output=True, check=True
        )
        assert read.stdout == content


def test_nobody_can_change_it(tmp_path: Path) -> None:
    path = graph_file(tmp_path)
    sealed = seal_graph(path, manifest_for(path.read_bytes()))
    with sealed.path.open("r+b") as file:
        with pytest.raises(PermissionError):
            os.write(file.fileno(), b"x")
        with pytest.raises(PermissionError):
            os.truncate(file.fileno(), 10)
        with pytest.raises(PermissionError):
            os.truncate(file.fileno(), 1_000_000)


@pytest.mark.parametrize("change", [b"", b"short", b"longer" * 100_000])
def test_a_file_that_has_changed_since_is_refused(tmp_path: Path, change: bytes) -> None:
    path = graph_file(tmp_path)
    manifest = manifest_for(path.read_bytes())
    path.write_bytes(change or bytes(len(path.read_bytes())))
    with pytest.raises(ArtifactRejected):
        seal_graph(path, manifest)
    path.unlink()
    with pytest.raises(ArtifactRejected, match="No such file"):
        seal_graph(path, manifest)


def test_it_is_gone_with_its_last_user(tmp_path: Path) -> None:
    path = graph_file(tmp_path)
    sealed = seal_graph(path, manifest_for(path.read_bytes()))
    place = sealed.path
    assert place.exists()
    del sealed
    assert not place.exists()
