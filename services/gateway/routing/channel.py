"""Ways to reach a worker: a gRPC channel, and a Unix socket where it is on this host."""

import asyncio
from typing import Any, Final

import grpc
import grpc.aio

from precast.errors import WorkerUnreachable
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.local_link import LocalLink, connect_locally
from precast.rpc.server import open_channel
from precast.rpc.tls import Tls

CONNECT_TIMEOUT_S: Final = 2.0


async def local_link(stub: Any) -> LocalLink | None:
    """A connection without gRPC, if the worker that answers here is on this host. It says itself
    which one it is: a lease may still be that of the one before it."""
    try:
        status = await stub.GetStatus(pb.GetStatusRequest(), timeout=CONNECT_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return None
    return await connect_locally(status.worker_id)


async def connect(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """A connected channel. Raises ``WorkerUnreachable`` after 2 s, or at once if refused."""
    channel = open_channel(address, tls)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await _until_connected(channel, address)
    except BaseException as error:
        await channel.close(None)
        if isinstance(error, TimeoutError):
            raise WorkerUnreachable(f"The worker at {address} doesn't answer.") from None
        raise
    return channel


async def _until_connected(channel: grpc.aio.Channel, address: str) -> None:
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise WorkerUnreachable(f"The worker at {address} can't be reached.")
        await channel.wait_for_state_change(state)
