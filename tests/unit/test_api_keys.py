"""API keys as files: made, found, listed, revoked; what is kept can't be sent."""

import json
import os
import stat
from pathlib import Path

import pytest

from precast.access import api_keys
from precast.access.api_keys import KeyRing, NewKey
from precast.errors import ConfigError
from precast.rpc.address import is_loopback


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "api"


def ring(folder: Path) -> KeyRing:
    return KeyRing(folder=folder)


def test_without_a_folder_no_key_is_asked_for(folder: Path) -> None:
    assert ring(folder).open
    _, key = api_keys.create(folder, NewKey(name="first"))
    assert not ring(folder).open
    api_keys.revoke(folder, key.id)
    assert not ring(folder).open, "revoking the last key opens nothing"


def test_a_key_is_found_by_what_its_owner_sends_and_by_nothing_else(folder: Path) -> None:
    text, key = api_keys.create(folder, NewKey(name="ann", tokens_per_minute=5))
    other, _ = api_keys.create(folder, NewKey(name="bob"))
    keys = ring(folder)
    assert keys.find(text) == key
    head, secret = text[: -len("x" * 43)], text[-43:]
    wrong = [
        *("", "x", text[:-1], text + "x", text.upper(), f" {text}", key.digest, key.id),
        head + key.digest[:43],
        head + other[-43:],
        f"pk_{'0' * 12}_{secret}",
    ]
    assert [sent for sent in wrong if keys.find(sent)] == []


def test_the_file_holds_a_digest_for_the_owner_alone(folder: Path) -> None:
    text, key = api_keys.create(folder, NewKey(name="ann"))
    [path] = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text[-43:] not in path.read_text()
    assert json.loads(path.read_text())["digest"] == key.digest


def test_changes_count_without_a_restart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "_LOOK_S", 0.0)
    keys = ring(folder)
    assert keys.open
    text, key = api_keys.create(folder, NewKey(name="ann"))
    assert keys.find(text) == key
    api_keys.revoke(folder, key.id[:5])
    assert keys.find(text) is None


def test_a_new_key_counts_at_once(folder: Path) -> None:
    api_keys.create(folder, NewKey(name="ann"))
    keys = ring(folder)
    assert not keys.open
    text, key = api_keys.create(folder, NewKey(name="bob"))
    assert keys.find(text) == key


def test_changes_within_a_tick_of_the_file_system_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "_LOOK_S", 0.0)
    ann, first = api_keys.create(folder, NewKey(name="ann"))
    keys = ring(folder)
    assert keys.find(ann) == first
    before = folder.stat()
    bob, second = api_keys.create(folder, NewKey(name="bob"))
    api_keys.revoke(folder, first.id)
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert keys.find(bob) == second
    assert keys.find(ann) is None


def test_limits_may_be_changed_in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for often in ("_LOOK_S", "_LIST_S"):
        monkeypatch.setattr(api_keys, often, 0.0)
    text, key = api_keys.create(folder, NewKey(name="ann", max_concurrent=1))
    keys = ring(folder)
    assert keys.find(text) == key
    [path] = folder.iterdir()
    path.write_text(path.read_text().replace('"max_concurrent": 1', '"max_concurrent": 12'))
    found = keys.find(text)
    assert found is not None
    assert found.max_concurrent == 12


def test_a_folder_that_goes_away_closes_the_door(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for a moment where another one is put in its place."""
    monkeypatch.setattr(api_keys, "_LOOK_S", 0.0)
    text, key = api_keys.create(folder, NewKey(name="ann"))
    keys = ring(folder)
    assert keys.find(text) == key
    folder.rename(folder.with_name("away"))
    assert keys.find(text) is None
    assert not keys.open
    folder.with_name("away").rename(folder)
    assert keys.find(text) == key


def test_what_is_no_key_is_left_out(folder: Path) -> None:
    text, key = api_keys.create(folder, NewKey(name="ann"))
    (folder / "0123456789ab.json").write_text("{")
    (folder / "ba9876543210.json").write_text((folder / f"{key.id}.json").read_text())
    (folder / "notes.txt").write_text("hello")
    assert api_keys.load(folder) == [key]
    assert ring(folder).find(text) == key


def test_a_folder_that_cannot_be_read_closes_the_door(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    keys = ring(tmp_path / "file" / "api")  # NotADirectoryError
    assert not keys.open
    assert keys.find(f"pk_{'0' * 12}_{'a' * 43}") is None


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (NewKey(name=""), "name"),
        (NewKey(name="two\nlines"), "name"),
        (NewKey(name="x", max_concurrent=0), "max_concurrent"),
    ],
)
def test_a_wrong_key_is_not_made(folder: Path, wanted: NewKey, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}: "):
        api_keys.create(folder, wanted)
    assert not folder.exists()


def test_revoking_needs_exactly_one(folder: Path) -> None:
    for name in ("ann", "bob"):
        api_keys.create(folder, NewKey(name=name))
    for beginning in ("", "zz"):
        with pytest.raises(ConfigError, match="0 API keys"):
            api_keys.revoke(folder, beginning)
    assert len(api_keys.load(folder)) == 2


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "*", "10.0.0.1", "example.com", "")))
