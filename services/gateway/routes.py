"""What the API's paths do."""

import time
from dataclasses import replace
from typing import Any, Final, TypeVar

from msgspec import UNSET, Struct
from starlette.requests import Request
from starlette.responses import Response

from precast import __version__
from precast.access.api_keys import KeyRing
from precast.config.settings import GatewaySettings
from services.gateway.access.tenant import tenant
from services.gateway.http.body import BodyReader, check_content_type
from services.gateway.http.paths import Paths
from services.gateway.metrics import Metrics
from services.gateway.on_demand import Models
from services.gateway.openai import errors, responses
from services.gateway.openai.bodies import named, parse_body
from services.gateway.openai.embeddings.fields import EmbeddingRequest
from services.gateway.openai.errors import ApiError
from services.gateway.openai.messages_api import convert as messages_api
from services.gateway.openai.messages_api.fields import CountTokensRequest, MessagesRequest
from services.gateway.openai.plan import Plan
from services.gateway.openai.prepare import Planner
from services.gateway.openai.responses_api.conversation import Conversations, KeepingResponse
from services.gateway.openai.responses_api.convert import chat_of
from services.gateway.openai.responses_api.fields import ResponsesRequest
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.streaming import GenerationResponse
from services.gateway.openai.tokenizing import DetokenizeRequest, TokenizeRequest, Version
from services.gateway.openai.written_names import as_written
from services.gateway.routing.pool import WorkerPool
from services.gateway.sole_model import SoleModel
from services.gateway.usage import expect_tokens

IGNORED: Final = "x-precast-ignored-fields"
"""Header of answers: fields of the request that nobody here knows."""
_B = TypeVar(
    "_B",
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


class Bodies:
    """Reads the bodies of requests."""

    def __init__(
        self, settings: GatewaySettings, metrics: Metrics, keys: KeyRing, sole: SoleModel
    ) -> None:
        self._reader = BodyReader(settings.max_body_bytes)
        self._open_to_pages = bool(settings.cors_origins)
        self._keys = keys
        self._strict = settings.strict_fields
        self._metrics = metrics
        self._sole = sole

    async def read(self, kind: type[_B], request: Request) -> tuple[_B, dict[str, str]]:
        """The body, with a model, and what the answer's headers say of it. Raises ``ApiError`` or
        ``WorkerUnavailable``."""
        typed = self._open_to_pages or not self._keys.open
        check_content_type(request, required=typed)
        content = await self._reader.read(request)
        body, unknown = parse_body(kind, content, strict=self._strict)
        self._metrics.ignored_fields.labels(request.scope["path"]).inc(len(unknown))
        if not body.model:
            body = body.model_copy(update={"model": await self._sole.name()})
        return body, {IGNORED: named(unknown)} if unknown else {}


def generation_routes(
    planner: Planner,
    pool: WorkerPool,
    metrics: Metrics,
    settings: GatewaySettings,
    bodies: Bodies,
    conversations: Conversations,
    models: Models,
) -> Paths:
    router = Paths("/v1")

    async def answer(
        request: Request, plan: Plan, started: float, headers: dict[str, str]
    ) -> Response:
        await expect_tokens(request.scope, plan.expected_tokens)
        timeout_s = settings.request_timeout_s
        return GenerationResponse(
            plan, pool, metrics, started=started, timeout_s=timeout_s, headers=headers
        )

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body, headers = await bodies.read(CompletionRequest, request)
        started = time.monotonic()
        async with models.held(body.model, request) as held:
            plan = await planner.completion(body)
            return held.until_sent(await answer(request, plan, started, headers))

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body, headers = await bodies.read(ChatRequest, request)
        started = time.monotonic()
        async with models.held(body.model, request) as held:
            plan = await planner.chat(body)
            return held.until_sent(await answer(request, plan, started, headers))

    @router.post("/responses")
    async def make_response(request: Request) -> Response:
        body, headers = await bodies.read(ResponsesRequest, request)
        started = time.monotonic()
        origin = await conversations.begin(body, tenant(request.scope))
        async with models.held(body.model, request) as held:
            try:
                plan = await planner.chat(chat_of(origin.whole))
            except ApiError as error:
                raise as_written(error, "responses") from None
            plan = replace(plan, endpoint="responses", origin=origin)
            made = await answer(request, plan, started, headers)
            return held.until_sent(KeepingResponse(made, conversations, origin))

    @router.post("/messages")
    async def messages(request: Request) -> Response:
        body, headers = await bodies.read(MessagesRequest, request)
        started = time.monotonic()
        async with models.held(body.model, request) as held:
            try:
                plan = await planner.chat(messages_api.chat_of(body))
            except ApiError as error:
                raise as_written(error, "messages") from None
            plan = replace(plan, endpoint="messages")
            return held.until_sent(await answer(request, plan, started, headers))

    @router.post("/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        body, headers = await bodies.read(CountTokensRequest, request)
        async with models.held(body.model, request):
            count = await planner.count(messages_api.chat_of(body))
            return _json({"input_tokens": count}, headers)

    @router.post("/embeddings")
    async def embeddings(request: Request) -> Response:
        body, headers = await bodies.read(EmbeddingRequest, request)
        started = time.monotonic()
        async with models.held(body.model, request) as held:
            plan = await planner.embedding(body, settings.embedding_pooling)
            return held.until_sent(await answer(request, plan, started, headers))

    return router


def kept_routes(conversations: Conversations) -> Paths:
    router = Paths("/v1/responses")

    @router.on("/{response_id}", "GET", "DELETE")
    async def kept(request: Request) -> Response:
        response_id = request.path_params["response_id"]
        whose = tenant(request.scope)
        if request.method == "GET":
            return _json(await conversations.get(response_id, whose))
        await conversations.delete(response_id, whose)
        return _json({"id": response_id, "object": "response", "deleted": True})

    return router


def token_routes(planner: Planner, bodies: Bodies, models: Models, sole: SoleModel) -> Paths:
    router = Paths()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body, headers = await bodies.read(TokenizeRequest, request)
        async with models.held(body.model, request):
            return _json(await planner.tokenize(body), headers)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body, headers = await bodies.read(DetokenizeRequest, request)
        async with models.held(body.model, request):
            return _json(await planner.detokenize(body), headers)

    @router.get("/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        model = request.query_params.get("model") or await sole.name()
        async with models.held(model, request):
            return _json(await planner.tokenizer_info(model))

    @router.get("/version")
    async def version(_: Request) -> Response:
        return _json(Version(version=__version__))

    return router


def model_routes(pool: WorkerPool, models: Models) -> Paths:
    router = Paths("/v1/models")

    async def served() -> dict[str, responses.Model]:
        """Models that run, and those that can be started, by name."""
        found = {
            name: responses.Model(
                id=name,
                created=one.created,
                max_model_len=one.context_length,
                root=one.parent or name,
                parent=one.parent or UNSET,
            )
            for name, one in (await models.listed()).items()
        }
        for name, created in pool.models.items():
            base = pool.base_of(name)
            found[name] = responses.Model(
                id=name,
                created=created,
                max_model_len=pool.max_context_length(name),
                root=base,
                parent=UNSET if base == name else base,
            )
        return dict(sorted(found.items()))

    @router.get("")
    async def every_model(_: Request) -> Response:
        return _json(responses.ModelList(data=list((await served()).values())))

    @router.get("/{model:path}")
    async def one_model(request: Request) -> Response:
        model = request.path_params["model"]
        found = (await served()).get(model)
        if found is None:
            raise errors.model_not_found(model)
        return _json(found)

    return router


def _json(body: Struct | dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(responses.encode(body), media_type="application/json", headers=headers)
