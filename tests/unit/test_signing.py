"""Signing keys on disk, trusted keys, and what verification refuses."""

import multiprocessing
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from precast.errors import ArtifactRejected, ConfigError
from precast.graphs.artifacts.signing import Signature, Signer, TrustedKeys, load_or_create_signer
from tests.support.artifacts import new_signer, trust


def create(home: Path) -> Signer:
    return load_or_create_signer(home / "signing.key", home / "trusted")


def test_key_is_made_once_and_trusted(tmp_path: Path) -> None:
    first, second = create(tmp_path), create(tmp_path)
    assert first.id == second.id
    assert stat.S_IMODE((tmp_path / "signing.key").stat().st_mode) == 0o600
    trusted = TrustedKeys.load(tmp_path / "trusted")
    assert list(trusted.keys) == [first.id]
    trusted.verify(b"message", first.sign(b"message"))


def _id_of_new_key(home: str) -> str:
    return create(Path(home)).id


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        ids = pool.map(_id_of_new_key, [str(tmp_path)] * 6)
    assert len(set(ids)) == 1
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["signing.key", "trusted"]


@pytest.mark.parametrize("content", [b"", b"not a key", b"\xff" * 100])
def test_damaged_signing_key_stops_a_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "signing.key").write_bytes(content)
    with pytest.raises(ConfigError, match=r"signing\.key"):
        create(tmp_path)


def test_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    key = X25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "signing.key").write_bytes(private)
    with pytest.raises(ConfigError, match="no Ed25519 key"):
        create(tmp_path)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "0123456789abcdef.pub").write_bytes(public)
    with pytest.raises(ConfigError, match="no Ed25519 key"):
        TrustedKeys.load(tmp_path)


def test_trusted_key_must_bear_its_own_name(tmp_path: Path) -> None:
    signer = create(tmp_path)
    path = tmp_path / "trusted" / f"{signer.id}.pub"
    path.rename(path.with_name("0123456789abcdef.pub"))
    with pytest.raises(ConfigError, match=signer.id):
        TrustedKeys.load(tmp_path / "trusted")


def test_missing_folder_trusts_nobody(tmp_path: Path) -> None:
    trusted = TrustedKeys.load(tmp_path / "none")
    with pytest.raises(ArtifactRejected, match="trusted: none"):
        trusted.verify(b"message", new_signer().sign(b"message"))


def test_refusals_say_why() -> None:
    signer, stranger = new_signer(), new_signer()
    trusted, signature = trust(signer), signer.sign(b"message")
    with pytest.raises(ArtifactRejected, match="does not match"):
        trusted.verify(b"massage", signature)
    with pytest.raises(ArtifactRejected, match="not trusted"):
        trusted.verify(b"message", stranger.sign(b"message"))
    borrowed = Signature(signer=signer.id, signature=stranger.sign(b"message").signature)
    with pytest.raises(ArtifactRejected, match="does not match"):
        trusted.verify(b"message", borrowed)
    with pytest.raises(ArtifactRejected, match="not signed"):
        trusted.verify(b"message", Signature(signer=signer.id, signature=b""))


def test_signature_file_round_trips() -> None:
    for signature in (new_signer().sign(b"message"), Signature(signer="", signature=b"")):
        assert Signature.decode(signature.encode()) == signature
    assert Signature.decode(b"unsigned").signature == b""


@pytest.mark.parametrize(
    "raw", [b"", b"one", b"a b c", b"a !!!", b"\xff\xfe b", b"a " + b"A" * 999]
)
def test_malformed_signature_file_is_refused(raw: bytes) -> None:
    with pytest.raises(ArtifactRejected, match="malformed"):
        Signature.decode(raw)
