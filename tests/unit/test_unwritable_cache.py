"""A cache that can't be written is read, and what can't be kept there is kept elsewhere."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from precast.errors import ArtifactRejected
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.key import spec_part
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed, trust

SIGNER = new_signer()


@pytest.fixture
def shipped(tmp_path: Path) -> Iterator[Path]:
    """A folder with version 1 of a graph, mounted read-only."""
    root = tmp_path / "cache"
    add(DiskStore(root).publish, tmp_path, 1)
    mount = subprocess.run(
        ["mount", "--bind", "-o", "ro", root, root], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("needs the right to mount")
    yield root
    subprocess.run(["umount", root], check=True)


def add(to: "object", folder: Path, version: int) -> dict[str, str]:
    path = graph_file(folder, seed=version)
    manifest = manifest_for(path.read_bytes(), version=version)
    to(*signed(manifest, SIGNER), path)  # type: ignore[operator]
    return spec_part(manifest.factors)


def test_a_shipped_graph_is_found_and_a_new_one_is_kept_elsewhere(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = GraphCache(shipped, trust(SIGNER))
    assert "graph cache can't be written" in capsys.readouterr().out
    spec = spec_part(manifest_for(b"x").factors)
    found = cache.find(spec)
    assert found is not None
    assert found.manifest.version == 1
    add(cache.add, tmp_path, 2)
    newer = cache.find(spec)
    assert newer is not None
    assert newer.manifest.version == 2
    assert not newer.graph_path.is_relative_to(shipped)


def test_what_must_go_is_not_found_any_more(shipped: Path) -> None:
    spec = spec_part(manifest_for(b"x").factors)
    key = manifest_for(b"x").key
    retired = GraphCache(shipped, trust(SIGNER))
    retired.retire(key, 0, {1})
    assert retired.find(spec) is None
    condemned = GraphCache(shipped, trust(SIGNER))
    condemned.condemn(key, 1, "SIGSEGV")
    assert condemned.find(spec) is None
    assert condemned.condemned() == {(key, 1, "SIGSEGV", 0)}
    path = graph_file(shipped.parent, seed=1)
    with pytest.raises(ArtifactRejected, match="put aside: SIGSEGV"):
        condemned.check(*signed(manifest_for(path.read_bytes()), SIGNER), spec)
    condemned.lift(key, {1: 1})
    assert condemned.find(spec) is not None
    assert condemned.condemned() == set()
    condemned.condemn(key, 1, "SIGSEGV", 1)
    condemned.lift(key, {1: 1})  # told again
    assert condemned.find(spec) is None
    assert condemned.condemned() == {(key, 1, "SIGSEGV", 1)}
    strange = GraphCache(shipped, trust(new_signer()))
    assert strange.distrust() == {(key, 1)}
    assert strange.find(spec) is None


def test_what_was_condemned_is_known_to_the_next_process_until_it_is_lifted(
    tmp_path: Path,
) -> None:
    key = manifest_for(b"x").key

    def opened() -> GraphCache:
        return GraphCache(tmp_path / "cache", trust(SIGNER))

    for lifts in (0, 1, 2):
        spec = add(opened().add, tmp_path, 1)
        opened().condemn(key, 1, "SIGILL", lifts)
        assert opened().condemned() == {(key, 1, "SIGILL", lifts)}
        assert opened().find(spec) is None
        for told in (lifts, lifts + 1):
            opened().lift(key, {1: told})
            assert len(opened().condemned()) == (told == lifts)


def test_a_folder_that_can_t_be_made(tmp_path: Path) -> None:
    """A file is in the way, as good as a root that is only read."""
    (tmp_path / "home").write_text("")
    cache = GraphCache(tmp_path / "home" / "cache", trust(SIGNER))
    spec = add(cache.add, tmp_path, 1)
    assert cache.find(spec) is not None


def test_a_temporary_folder_does_not_outlive_its_worker(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    program = (
        "import sys; from pathlib import Path;"
        "from precast.graphs.artifacts.cache import GraphCache;"
        "from precast.graphs.artifacts.signing import TrustedKeys;"
        "GraphCache(Path(sys.argv[1]), TrustedKeys(keys={}))"
    )
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "home" / "cache"],
        env={"TMPDIR": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
