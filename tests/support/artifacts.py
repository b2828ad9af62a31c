"""Small signed artifacts for tests."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from precast.graphs.artifacts.manifest import Manifest, encode_manifest
from precast.graphs.artifacts.signing import Signature, Signer, TrustedKeys
from precast.graphs.key import graph_key
from precast.system.sealed_file import SealedFile
from tests.support.compile_worker import BUILD, FACTORS


def new_signer() -> Signer:
    return Signer(key=Ed25519PrivateKey.generate())


def trust(*signers: Signer) -> TrustedKeys:
    return TrustedKeys(keys={signer.id: signer.key.public_key() for signer in signers})


def manifest_for(graph: bytes, *, version: int = 1, **factors: str) -> Manifest:
    """A true manifest of these bytes for FACTORS with changes."""
    spec = {**FACTORS, **factors}
    return Manifest(
        key=graph_key(spec, BUILD),
        version=version,
        factors={**spec, **BUILD},
        models=("tiny",),
        size=len(graph),
        digest=blake3(graph).hexdigest(),
        created_at=1_700_000_000.0 + version,
        max_relative_error=1e-6,
        capture_s=1.5,
        layer_us=900.0,
        compiler="test 1.0",
    )


def signed(manifest: Manifest, signer: Signer) -> tuple[bytes, Signature]:
    raw = encode_manifest(manifest)
    return raw, signer.sign(raw)


def graph_file(folder: Path, *, seed: int = 0, size: int = 100_000) -> Path:
    """A file that stands for a package: its content doesn't matter to the store."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"made-{seed}.pt2"
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def at_path(path: Path) -> SealedFile:
    """As if it were sealed: for ranks that only look at the path."""
    return cast(SealedFile, SimpleNamespace(path=path))
