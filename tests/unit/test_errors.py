"""The error tree and its gRPC statuses."""

import inspect

import grpc
import pytest

from precast import errors
from precast.rpc.server import status_of

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_status_and_stands_in_the_tree(kind: type[errors.PrecastError]) -> None:
    assert issubclass(kind, errors.PrecastError)
    assert kind.__name__ in (errors.__doc__ or "")
    expects_internal = kind is errors.PrecastError
    assert (status_of(kind("x")) is grpc.StatusCode.INTERNAL) == expects_internal
