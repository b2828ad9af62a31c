"""``deploy/credentials.sh``, which makes what a stack of containers has for secrets, without the
containers: each volume is a folder here."""

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from precast.access import api_keys
from precast.access.api_keys import KeyRing
from precast.rpc.tls import Role, Tls
from precast.rpc.tls_files import KEY_FILE
from tests.support.decode_worker import ROOT

SCRIPT = ROOT / "deploy" / "credentials.sh"
VOLUMES = ("authority", "keys", "redis", *Role)
pytestmark = pytest.mark.timeout(120)


@dataclass(frozen=True, kw_only=True)
class Start:
    volumes: Path
    said: str


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """After a first start."""
    volumes = empty(tmp_path_factory.mktemp("first"))
    done = credentials(volumes)
    assert (done.returncode, done.stderr) == (0, "")
    return Start(volumes=volumes, said=done.stdout)


@pytest.fixture
def volumes(first: Start, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(first.volumes, tmp_path / "volumes")


def empty(folder: Path) -> Path:
    for name in VOLUMES:
        (folder / name).mkdir()
    return folder


def credentials(volumes: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CREDENTIALS_DIR": str(volumes)}
    command = ["sh", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def contents(volumes: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in volumes.rglob("*") if path.is_file()}


def test_the_first_start_makes_everything_and_later_ones_nothing(
    first: Start, volumes: Path
) -> None:
    shown = credentials(volumes, "api-key").stdout.strip()
    assert "credentials api-key" in first.said and shown not in first.said
    assert KeyRing(folder=volumes / "keys" / "api").find(shown)
    password = (volumes / "redis" / "redis.password").read_text()
    assert len(password) == 64
    assert (volumes / "redis" / "redis.conf").read_text() == f"requirepass {password}\n"
    for role in Role:
        assert Tls.load(volumes / role, role)
        assert (volumes / role / "redis.password").read_text() == password
    made = contents(volumes)
    again = credentials(volumes)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert contents(volumes) == made
    assert credentials(volumes, "api-key").stdout.strip() == shown


def test_nobody_else_reads_them(first: Start) -> None:
    volumes = first.volumes
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in contents(volumes)}
    group = {path for path, mode in modes.items() if mode & 0o077}
    assert group == {volumes / "redis" / name for name in ("redis.conf", "redis.password")}
    assert {modes[path] for path in group} == {0o640}
    [authority] = volumes.rglob("ca.key")
    assert authority.parent == volumes / "authority"


def test_what_is_missing_is_made_anew_and_the_rest_stays(volumes: Path) -> None:
    """A volume that is gone gets what the others know; a start that was killed is made up for."""
    before = contents(volumes)
    gone = volumes / Role.GATEWAY / Role.GATEWAY / KEY_FILE
    gone.unlink()
    assert credentials(volumes).returncode == 0
    assert contents(volumes) == before
    (volumes / "authority" / Role.ADMIN / KEY_FILE).unlink()
    (volumes / "keys" / "api").rename(volumes / "keys" / ".api")  # before it has got its name
    assert credentials(volumes).returncode == 0
    shown = credentials(volumes, "api-key").stdout.strip()
    assert KeyRing(folder=volumes / "keys" / "api").find(shown)
    after = contents(volumes)
    assert after[volumes / "authority" / "ca.key"] == before[volumes / "authority" / "ca.key"]
    assert after[gone] != before[gone]


def test_a_stack_that_has_keys_gets_no_other(volumes: Path) -> None:
    shutil.rmtree(volumes / "keys" / "api")
    api_keys.create(volumes / "keys" / "api", api_keys.NewKey(name="ann"))
    assert credentials(volumes).stdout == ""
    assert len(api_keys.load(volumes / "keys" / "api")) == 1


def test_what_it_does_not_know(tmp_path: Path) -> None:
    done = credentials(empty(tmp_path), "delete")
    assert (done.returncode, contents(tmp_path)) == (2, {})
    assert "neither api-key nor renew" in done.stderr
