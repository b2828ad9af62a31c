"""Requests that go on behind output that another worker, or this one before, has made.

The given tokens are output like any other: they count in ``max_tokens``, penalties and draws, and
the text goes on where theirs ends. They were sent already, so that nothing of them is sent again.
"""

from precast.errors import InvalidRequest
from precast.proto.decode.v1 import decode_service_pb2 as pb


def resumed_output(
    start: pb.StartGeneration, *, vocab_size: int, stop_token_ids: frozenset[int]
) -> list[int]:
    """The output that a request begins with. Raises InvalidRequest."""
    tokens = list(start.resumed_token_ids)
    if not tokens:
        return tokens
    if (largest := max(tokens)) >= vocab_size:
        raise InvalidRequest(
            f"resumed_token_ids: token id {largest} is outside of the vocabulary of {vocab_size}"
        )
    if len(tokens) >= start.stop.max_tokens:
        raise InvalidRequest(
            f"resumed_token_ids has {len(tokens)} tokens, but max_tokens = {start.stop.max_tokens}"
        )
    if not stop_token_ids.isdisjoint(tokens):
        raise InvalidRequest("resumed_token_ids has a token that ends the output")
    return tokens
