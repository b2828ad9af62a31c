"""What operators decide of versions: rollbacks, pins, and the end of a quarantine."""

import asyncio

from precast.errors import GraphNotFound, InvalidRequest
from precast.graphs.artifacts.versions import Verdict, previous
from precast.log import get_logger
from services.compile_worker.catalog.versions import Standing, Versions

log = get_logger(__name__)


async def roll_back(versions: Versions, key: str, to: int) -> int:
    """Serve an earlier version (0: the one before) and withdraw what is newer.

    Returns its number. Raises ``GraphNotFound`` or ``InvalidRequest``.
    """
    now = await versions.standing(key)
    lifecycle = now.lifecycle
    if lifecycle.pin.version:
        raise InvalidRequest(
            f"graph {key} is pinned to version {lifecycle.pin.version}; unpin it first"
        )
    target = to or previous(lifecycle, now.there)
    if not target:
        raise InvalidRequest(f"graph {key} has no earlier version to go back to")
    _check_servable(key, target, now)
    for number in now.there:
        if number > target and lifecycle.verdict(number) is not Verdict.QUARANTINED:
            reason = f"rolled back to version {target} by hand"
            lifecycle = lifecycle.marked(number, Verdict.WITHDRAWN, reason)
    lifecycle = lifecycle.marked(target, Verdict.GOOD, "chosen by hand")
    await versions.decide(key, lifecycle)
    return target


async def pin(versions: Versions, key: str, version: int) -> None:
    """Fix the serving version; 0 frees it. Raises ``GraphNotFound`` or
    ``InvalidRequest``."""
    now = await versions.standing(key)
    if version:
        _check_servable(key, version, now)
    elif not now.there:
        raise GraphNotFound(f"no version of graph {key[:64]!r}")
    await versions.decide(key, now.lifecycle.pinned(version))


async def lift(versions: Versions, key: str, version: int) -> int:
    """Take a version out of its quarantine; the one that serves then.

    Raises ``GraphNotFound``, or ``InvalidRequest`` if it isn't quarantined.
    """
    now = await versions.standing(key)
    if reason := (await asyncio.to_thread(versions.store.put_aside, key)).get(version):
        raise InvalidRequest(
            f"version {version} of graph {key} is damaged: {reason}; recompile it instead"
        )
    _check_there(key, version, now)
    if now.lifecycle.verdict(version) is not Verdict.QUARANTINED:
        raise InvalidRequest(f"version {version} of graph {key} is not quarantined")
    log.warning("quarantine lifted", key=key, version=version)
    await versions.decide(key, now.lifecycle.lifted(version, "quarantine lifted by hand"))
    return (await versions.standing(key)).serving


def _check_servable(key: str, version: int, now: Standing) -> None:
    if now.lifecycle.verdict(version) is Verdict.QUARANTINED:
        raise InvalidRequest(
            f"version {version} of graph {key} is quarantined: {now.lifecycle.reason(version)}"
        )
    _check_there(key, version, now)


def _check_there(key: str, version: int, now: Standing) -> None:
    if version not in now.there:
        known = ", ".join(map(str, now.there)) or "none"
        raise GraphNotFound(f"graph {key} has no version {version} (there are: {known})")
