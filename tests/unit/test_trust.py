"""Keys that come, go and are replaced while a process runs."""

from pathlib import Path

import pytest

from precast.errors import ArtifactRejected, ConfigError
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.artifacts.signing import Signature, Signer, replace_signer, trust_key
from precast.graphs.artifacts.trust import SigningKey, TrustFolder
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed
from tests.support.compile_worker import FACTORS

UNSIGNED = Signature(signer="", signature=b"")


def trusts(folder: TrustFolder, signer: Signer) -> bool:
    try:
        folder.verify(b"message", signer.sign(b"message"))
    except ArtifactRejected:
        return False
    return True


def test_trust_follows_the_files(tmp_path: Path) -> None:
    folder, one, two = TrustFolder(folder=tmp_path / "trusted"), new_signer(), new_signer()
    assert not trusts(folder, one)
    path = trust_key(one.key.public_key(), folder.folder)
    assert trusts(folder, one)
    assert not trusts(folder, two)
    trust_key(two.key.public_key(), folder.folder)
    assert trusts(folder, two)
    path.unlink()
    assert not trusts(folder, one)
    assert trusts(folder, two)


def test_file_that_is_no_key_is_not_trusted_and_harms_no_other(tmp_path: Path) -> None:
    folder, signer = TrustFolder(folder=tmp_path), new_signer()
    path = trust_key(signer.key.public_key(), tmp_path)
    (tmp_path / "0123456789abcdef.pub").write_bytes(path.read_bytes())
    (tmp_path / "half.pub").write_bytes(path.read_bytes()[:20])
    assert trusts(folder, signer)
    assert list(folder.keys) == [signer.id]
    with pytest.raises(ConfigError, match="trusted key"):
        folder.require_valid()


def test_signing_key_is_followed_and_trusted_before_it_signs(tmp_path: Path) -> None:
    path, trusted = tmp_path / "signing.key", TrustFolder(folder=tmp_path / "trusted")
    signing = SigningKey(path=path, trusted_dir=trusted.folder)
    old = signing.now()
    assert signing.now() is old
    new = replace_signer(path, trusted.folder)
    assert signing.now().id == new.id != old.id
    assert trusts(trusted, old)
    assert trusts(trusted, signing.now())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["signing.key", "trusted"]


def test_unsigned_is_believed_only_with_the_switch_and_never_a_lie(tmp_path: Path) -> None:
    ours, stranger = new_signer(), new_signer()
    trust_key(ours.key.public_key(), tmp_path)
    strict = TrustFolder(folder=tmp_path)
    loose = TrustFolder(folder=tmp_path, allow_unsigned=True)
    foreign = stranger.sign(b"message")
    for signature in (UNSIGNED, foreign):
        loose.verify(b"message", signature)
        with pytest.raises(ArtifactRejected):
            strict.verify(b"message", signature)
    lie = Signature(signer=ours.id, signature=foreign.signature)
    for folder in (strict, loose):
        with pytest.raises(ArtifactRejected, match="does not match"):
            folder.verify(b"message", lie)


def test_digest_counts_without_a_signature_too(tmp_path: Path) -> None:
    trust = TrustFolder(folder=tmp_path / "trusted", allow_unsigned=True)
    cache = GraphCache(tmp_path / "cache", trust)
    made = graph_file(tmp_path)
    raw, _ = signed(manifest_for(made.read_bytes()), new_signer())
    artifact = cache.add(raw, UNSIGNED, made)
    assert artifact.signature == UNSIGNED
    assert cache.find(FACTORS) == artifact
    assert not cache.is_signed(artifact)
    artifact.graph_path.write_bytes(artifact.graph_path.read_bytes()[:-1] + b"?")
    assert cache.find(FACTORS) is None


def test_revoked_keys_graphs_leave_a_cache_that_is_open(tmp_path: Path) -> None:
    trusted, old, new = TrustFolder(folder=tmp_path / "trusted"), new_signer(), new_signer()
    paths = [trust_key(signer.key.public_key(), trusted.folder) for signer in (old, new)]
    cache = GraphCache(tmp_path / "cache", trusted)
    kept: dict[str, str] = {}
    for number, signer in enumerate((old, new)):
        made = graph_file(tmp_path, seed=number)
        manifest = manifest_for(made.read_bytes(), num_tokens=str(number + 1))
        cache.add(*signed(manifest, signer), made)
        kept[signer.id] = manifest.key
    paths[0].unlink()
    with pytest.raises(ArtifactRejected, match="not trusted"):
        cache.open(kept[old.id], 1, FACTORS)
    assert cache.distrust() == {(kept[old.id], 1)}
    assert DiskStore(tmp_path / "cache").published_keys() == [kept[new.id]]


def test_new_signature_of_the_same_bytes_replaces_the_old_one(tmp_path: Path) -> None:
    trusted, old, new = TrustFolder(folder=tmp_path / "trusted"), new_signer(), new_signer()
    paths = [trust_key(signer.key.public_key(), trusted.folder) for signer in (old, new)]
    cache = GraphCache(tmp_path / "cache", trusted)
    made = graph_file(tmp_path)
    manifest = manifest_for(made.read_bytes())
    cache.add(*signed(manifest, old), made)
    cache.add(*signed(manifest, new), made)
    paths[0].unlink()
    assert cache.distrust() == set()
    found = cache.find(FACTORS)
    assert found
    assert found.signature.signer == new.id
