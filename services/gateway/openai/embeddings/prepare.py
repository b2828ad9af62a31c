"""From a body of ``/v1/embeddings`` to what the workers are asked for."""

from typing import Final

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.tokenizer.model_tokenizer import ModelTokenizer
from services.gateway.openai.embeddings.fields import EmbeddingRequest, Pooling
from services.gateway.openai.errors import context_length_exceeded, invalid
from services.gateway.openai.lengths import LimitedTokenizer
from services.gateway.openai.plan import Plan
from services.gateway.openai.prompts import check_ids, truncated

_POOLINGS: Final = {"mean": pb.POOLING_MEAN, "last": pb.POOLING_LAST}


async def embedding_plan(
    body: EmbeddingRequest,
    tokenizer: ModelTokenizer,
    limited: LimitedTokenizer,
    limit: int,
    pooling: Pooling,
    fingerprint: str,
) -> Plan:
    """``limit``: of the context; ``pooling``: where none is asked for. Raises ``ApiError`` 400."""
    inputs = [truncated(body, ids, limit) for ids in await _input_ids(body, tokenizer, limited)]
    for ids in inputs:
        if len(ids) > limit:
            raise context_length_exceeded(limit, len(ids), 0, "input")
    wanted = pb.Embedding(
        pooling=_POOLINGS[body.pooling or pooling],
        dimensions=body.dimensions or 0,
        raw=body.normalize is False,
    )
    return Plan(
        endpoint="embeddings",
        model=body.model,
        starts=tuple(_start(body, ids, wanted) for ids in inputs),
        echoes=("",) * len(inputs),
        stream=False,
        include_usage=False,
        continuous_usage=False,
        prompt_tokens=sum(map(len, inputs)),
        choices_per_prompt=1,
        shown_per_prompt=1,
        fingerprint=fingerprint,
        origin=body,
        tokenizer_digest=tokenizer.digest,
    )


async def _input_ids(
    body: EmbeddingRequest, tokenizer: ModelTokenizer, limited: LimitedTokenizer
) -> list[list[int]]:
    texts = [one for one in body.inputs if isinstance(one, str)]
    special = body.add_special_tokens is not False
    encoded = iter(await limited.encode(texts, "input", add_special_tokens=special))
    found = [next(encoded) if isinstance(one, str) else one for one in body.inputs]
    for ids in found:
        if not ids:
            raise invalid("Invalid 'input': it has no tokens.", "input")
        check_ids("input", ids, tokenizer)
    return found


def _start(body: EmbeddingRequest, ids: list[int], wanted: pb.Embedding) -> pb.StartGeneration:
    return pb.StartGeneration(
        model=body.model,
        prompt_token_ids=ids,
        embed=wanted,
        cache_salt=body.cache_salt or "",
        priority=-(body.priority or 0),
    )
