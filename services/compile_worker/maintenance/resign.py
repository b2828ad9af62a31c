"""Signs artifacts again with the present key, so that the key that signed them can be revoked."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

from precast.errors import ArtifactRejected, GraphNotFound
from precast.graphs.artifacts.signing import Signer
from precast.graphs.artifacts.store import Holding
from precast.log import get_logger
from services.compile_worker.catalog.entry import changed
from services.compile_worker.graphs import Graphs
from services.compile_worker.maintenance.store import Damage

log = get_logger(__name__)


@dataclass(kw_only=True)
class Resigned:
    """What became of a store's signatures."""

    signer: str
    """Whose key signs now."""
    signed: int = 0
    unchanged: int = 0
    refused: list[Damage] = field(default_factory=list)
    """Damaged, or not signed by a trusted key: the present key must not vouch for them."""


async def resign(graphs: Graphs, signers: Collection[str]) -> Resigned:
    """Sign what ``signers`` (none: any trusted key) have signed; workers fetch the new signatures.

    Every byte is compared with its digest before. Raises ``StoreUnavailable`` or ``ConfigError``.
    """
    signer = graphs.signing()
    found = Resigned(signer=signer.id)
    for holding in await asyncio.to_thread(graphs.store.holdings):
        try:
            signed = await asyncio.to_thread(_resign, graphs, holding, signer, signers)
        except GraphNotFound:  # removed meanwhile
            continue
        except ArtifactRejected as error:
            damage = Damage(key=holding.key, version=holding.version, reason=str(error))
            found.refused.append(damage)
            continue
        found.signed += signed
        found.unchanged += not signed
        record = graphs.index.get(holding.key)
        if signed and record and record.version == holding.version:
            await graphs.index.put(changed(record, signer=signer.id))
    log.info(
        "store signed again",
        signer=signer.id,
        signed=found.signed,
        unchanged=found.unchanged,
        refused=len(found.refused),
    )
    return found


def _resign(graphs: Graphs, holding: Holding, signer: Signer, signers: Collection[str]) -> bool:
    """Whether an artifact got another signature. Raises ``GraphNotFound``, ``ArtifactRejected``."""
    key, version = holding.key, holding.version
    manifest, signature = graphs.store.read_back(key, version)
    graphs.versions.trusted.verify(manifest, signature)
    if signature.signer == signer.id or (signers and signature.signer not in signers):
        return False
    graphs.store.resign(key, version, signer.sign(manifest))
    return True
