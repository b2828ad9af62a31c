"""How ``precast`` commands reach a decode worker."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from precast.cli.compile_link import CALL_TIMEOUT_S
from precast.config.settings import CommonSettings, load_settings
from precast.errors import PrecastError, WorkerUnavailable

if TYPE_CHECKING:
    from precast.fleet.leases import DecodeLease


async def ask_worker(
    worker: str,
    redis_url: str | None,
    method: Callable[[Any], Any],
    request: Any,
    *,
    timeout_s: float = CALL_TIMEOUT_S,
) -> Any:
    """The answer of a decode worker, named by its id, how it begins, or HOST:PORT; ``method``
    chooses what is called. Raises ``WorkerUnavailable``."""
    import grpc.aio

    from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
    from precast.rpc.server import error_of, open_channel
    from precast.rpc.tls import Role, Tls

    address = worker if ":" in worker else await _address(worker, redis_url)
    tls = Tls.load(load_settings(CommonSettings).tls_dir, Role.ADMIN)
    async with open_channel(address, tls) as channel:
        stub: Any = DecodeServiceStub(channel)
        try:
            return await method(stub)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as failure:
            error: PrecastError = error_of(failure)
            if failure.code() is grpc.StatusCode.UNAVAILABLE:
                error = WorkerUnavailable(f"decode worker at {address}: {error}")
            raise error from None


async def live_workers(redis_url: str | None) -> "list[DecodeLease]":
    """Decode workers that hold a lease, by id. Raises ``RegistryUnavailable``."""
    from precast.fleet.leases import Registry

    registry = Registry.connect(load_settings(CommonSettings, redis_url=redis_url).redis_url)
    try:
        return await registry.decode_workers()
    finally:
        await registry.close()


async def _address(worker: str, redis_url: str | None) -> str:
    leases = await live_workers(redis_url)
    found = [lease for lease in leases if lease.worker_id.startswith(worker)]
    if len(found) != 1:
        known = ", ".join(lease.worker_id for lease in leases) or "none"
        raise WorkerUnavailable(
            f"{len(found)} live decode workers have an id that begins with {worker!r} "
            f"(live: {known})"
        )
    return found[0].address
