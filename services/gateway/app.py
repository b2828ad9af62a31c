"""The FastAPI application: routes, and what they share."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final, TypeVar

from fastapi import APIRouter, FastAPI
from msgspec import Struct
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from precast import __version__
from precast.access.api_keys import KeyRing
from precast.config.settings import GatewaySettings
from precast.fleet.leases import Registry
from precast.rpc.tls import Role, Tls
from precast.tokenizer.model_tokenizer import TokenizerStore
from services.gateway.access.guard import Guard
from services.gateway.access.quota import Quota
from services.gateway.http.body import BodyReader, check_content_type
from services.gateway.in_flight import InFlight
from services.gateway.metrics import Metrics
from services.gateway.middleware import Admission, Leniency, PrivatePort, RequestIds
from services.gateway.openai import errors, responses
from services.gateway.openai.bodies import named, parse_naming_unknown
from services.gateway.openai.errors import ApiError
from services.gateway.openai.messages_api import convert as messages_api
from services.gateway.openai.messages_api.fields import MessagesRequest
from services.gateway.openai.plan import Plan
from services.gateway.openai.prepare import Parsers, Planner
from services.gateway.openai.responses_api.convert import as_written, chat_of, path_as_written
from services.gateway.openai.responses_api.fields import ResponsesRequest
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.streaming import GenerationResponse
from services.gateway.openai.tokenizing import DetokenizeRequest, TokenizeRequest, Version
from services.gateway.operations import health_routes, private_app, reference_routes
from services.gateway.request_id import HEADER as REQUEST_ID
from services.gateway.routing.pool import WorkerPool

_POSTS: Final = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/tokenize", "/detokenize"),
)
_FREE: Final = ("/health", "/ready")
"""What load balancers ask, who have no key."""
IGNORED: Final = "x-precast-ignored-fields"
"""Header of answers: fields of the request that nobody here knows."""
_B = TypeVar("_B", bound=BaseModel)


def create_app(
    settings: GatewaySettings, private_port: int | None = None, in_flight: InFlight | None = None
) -> FastAPI:
    """The gateway. It finds workers from the app's start to its end (ASGI lifespan).

    Requests that come in on ``private_port`` get metrics and the reference, and nothing else does.
    ``in_flight``: what it shares with others on its port.
    """
    metrics = Metrics()
    registry = Registry.connect(settings.redis_url)
    pool = WorkerPool(
        registry,
        refresh_s=settings.worker_refresh_s,
        expected_models=settings.expected_models,
        tls=Tls.load(settings.tls_dir, Role.GATEWAY),
    )
    quota = Quota(settings.redis_url, longest_s=settings.request_timeout_s)
    _watch_workers(metrics, pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.close()
            await quota.close()
            await registry.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.end_requests = pool.end_requests
    errors.install(app)
    keys = KeyRing(folder=settings.api_keys_dir)
    app.add_middleware(Guard, keys=keys, quota=quota, free=_FREE)
    _add_middleware(app, settings, metrics, in_flight or InFlight())
    if private_port is not None:
        private = private_app(metrics, pool)
        app.add_middleware(PrivatePort, private=private, port=private_port)
    parsers = Parsers(
        tools=settings.tool_parser,
        reasoning=settings.reasoning_parser,
        allow_control_tokens=settings.allow_control_tokens,
    )
    bodies = _Bodies(settings, metrics, keys)
    planner = Planner(pool, TokenizerStore(settings.models_dir), parsers)
    app.include_router(_generation_routes(planner, pool, metrics, settings, bodies))
    app.include_router(_token_routes(planner, bodies))
    app.include_router(_model_routes(pool))
    app.include_router(health_routes(pool))
    app.include_router(reference_routes())
    return app


def _add_middleware(
    app: FastAPI, settings: GatewaySettings, metrics: Metrics, in_flight: InFlight
) -> None:
    """The last one added sees a request first."""
    app.add_middleware(
        Admission,
        metrics=metrics,
        in_flight=in_flight,
        max_in_flight=settings.max_in_flight,
        endpoints=_POSTS,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("retry-after", REQUEST_ID, IGNORED),
        )
    app.add_middleware(Leniency)
    app.add_middleware(RequestIds, access_log=settings.access_log)


def _watch_workers(metrics: Metrics, pool: WorkerPool) -> None:
    metrics.watch("gateway_workers", "Workers with a lease", lambda: len(pool.workers))
    metrics.watch(
        "gateway_workers_ready",
        "Workers that are ready",
        lambda: sum(worker.ready for worker in pool.workers),
    )
    metrics.watch(
        "gateway_workers_spared",
        "Workers that get only what no other can take, for they keep failing",
        lambda: sum(worker.spared for worker in pool.workers),
    )
    metrics.watch(
        "gateway_generations",
        "Generations that are at workers",
        lambda: sum(worker.load.reserved for worker in pool.workers),
    )


class _Bodies:
    """Reads the bodies of requests."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics, keys: KeyRing) -> None:
        self._reader = BodyReader(settings.max_body_bytes)
        self._open_to_pages = bool(settings.cors_origins)
        self._keys = keys
        self._strict = settings.strict_fields
        self._metrics = metrics

    async def read(self, kind: type[_B], request: Request) -> tuple[_B, dict[str, str]]:
        """The body, and what the answer's headers say of it. Raises ``ApiError``."""
        typed = self._open_to_pages or not self._keys.open
        check_content_type(request, required=typed)
        content = await self._reader.read(request)
        body, unknown = parse_naming_unknown(kind, content, strict=self._strict)
        self._metrics.ignored_fields.labels(request.scope["path"]).inc(len(unknown))
        return body, {IGNORED: named(unknown)} if unknown else {}


def _generation_routes(
    planner: Planner,
    pool: WorkerPool,
    metrics: Metrics,
    settings: GatewaySettings,
    bodies: _Bodies,
) -> APIRouter:
    router = APIRouter(prefix="/v1")

    def answer(plan: Plan, started: float, headers: dict[str, str]) -> Response:
        timeout_s = settings.request_timeout_s
        return GenerationResponse(
            plan, pool, metrics, started=started, timeout_s=timeout_s, headers=headers
        )

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body, headers = await bodies.read(CompletionRequest, request)
        started = time.monotonic()
        return answer(await planner.completion(body), started, headers)

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body, headers = await bodies.read(ChatRequest, request)
        started = time.monotonic()
        return answer(await planner.chat(body), started, headers)

    @router.post("/responses")
    async def make_response(request: Request) -> Response:
        body, headers = await bodies.read(ResponsesRequest, request)
        started = time.monotonic()
        try:
            plan = await planner.chat(chat_of(body))
        except ApiError as error:
            raise as_written(error) from None
        field = plan.constrained_by and path_as_written(plan.constrained_by)
        plan = replace(plan, endpoint="responses", origin=body, constrained_by=field)
        return answer(plan, started, headers)

    @router.post("/messages")
    async def messages(request: Request) -> Response:
        body, headers = await bodies.read(MessagesRequest, request)
        started = time.monotonic()
        plan = await planner.chat(messages_api.chat_of(body))
        return answer(replace(plan, endpoint="messages"), started, headers)

    return router


def _token_routes(planner: Planner, bodies: _Bodies) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body, headers = await bodies.read(TokenizeRequest, request)
        return _json(await planner.tokenize(body), headers)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body, headers = await bodies.read(DetokenizeRequest, request)
        return _json(await planner.detokenize(body), headers)

    @router.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> Response:
        return _json(await planner.tokenizer_info(model))

    @router.get("/version")
    async def version() -> Response:
        return _json(Version(version=__version__))

    return router


def _model_routes(pool: WorkerPool) -> APIRouter:
    router = APIRouter(prefix="/v1/models")

    def describe(model: str, created: int) -> responses.Model:
        length = pool.max_context_length(model)
        return responses.Model(id=model, created=created, max_model_len=length)

    @router.get("")
    async def models() -> Response:
        found = [describe(model, created) for model, created in pool.models.items()]
        return _json(responses.ModelList(data=found))

    @router.get("/{model:path}")
    async def model(model: str) -> Response:
        created = pool.models.get(model)
        if created is None:
            raise errors.model_not_found(model)
        return _json(describe(model, created))

    return router


def _json(body: Struct, headers: dict[str, str] | None = None) -> Response:
    return Response(responses.encode(body), media_type="application/json", headers=headers)
