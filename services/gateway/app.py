"""The FastAPI application: routes, and what they share."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from precast.config.settings import GatewaySettings
from precast.fleet.leases import Registry
from precast.tokenizer.model_tokenizer import TokenizerStore
from services.gateway.metrics import Metrics
from services.gateway.middleware import Admission
from services.gateway.openai import errors, responses
from services.gateway.openai.prepare import Plan, Planner
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.streaming import GenerationResponse
from services.gateway.routing.pool import WorkerPool


def create_app(settings: GatewaySettings) -> FastAPI:
    """The gateway. It finds workers from the app's start to its end (ASGI lifespan)."""
    metrics = Metrics()
    registry = Registry.connect(settings.redis_url)
    pool = WorkerPool(registry, refresh_s=settings.worker_refresh_s)
    _watch_workers(metrics, pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.close()
            await registry.close()

    app = FastAPI(
        title="Precast",
        lifespan=lifespan,
        strict_content_type=False,  # a body without a content type is JSON
        redoc_url=None,
    )
    errors.install(app)
    app.add_middleware(
        Admission,
        metrics=metrics,
        max_in_flight=settings.max_in_flight,
        max_body_bytes=settings.max_body_bytes,
    )
    planner = Planner(
        pool,
        TokenizerStore(settings.models_dir),
        allow_control_tokens=settings.allow_control_tokens,
    )
    app.include_router(_generation_routes(planner, pool, metrics, settings.request_timeout_s))
    app.include_router(_model_routes(pool))
    app.include_router(_operation_routes(pool, metrics))
    return app


def _watch_workers(metrics: Metrics, pool: WorkerPool) -> None:
    metrics.watch("gateway_workers", "Workers with a lease", lambda: len(pool.workers))
    metrics.watch(
        "gateway_workers_ready",
        "Workers that are ready",
        lambda: sum(worker.ready for worker in pool.workers),
    )
    metrics.watch(
        "gateway_generations",
        "Generations that are at workers",
        lambda: sum(worker.load.reserved for worker in pool.workers),
    )


def _generation_routes(
    planner: Planner, pool: WorkerPool, metrics: Metrics, timeout_s: float
) -> APIRouter:
    router = APIRouter(prefix="/v1")

    def answer(plan: Plan, started: float) -> Response:
        return GenerationResponse(plan, pool, metrics, started=started, timeout_s=timeout_s)

    @router.post("/completions")
    async def completions(body: CompletionRequest) -> Response:
        started = time.monotonic()
        return answer(await planner.completion(body), started)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest) -> Response:
        started = time.monotonic()
        return answer(await planner.chat(body), started)

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


def _operation_routes(pool: WorkerPool, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """The process answers; says nothing of workers."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """A worker is ready."""
        count = sum(worker.ready for worker in pool.workers)
        if not count:
            raise errors.unavailable("No worker is ready.", "not_ready")
        return JSONResponse({"status": "ready", "workers": count, "models": list(pool.models)})

    @router.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _json(body: Struct) -> Response:
    return Response(responses.encode(body), media_type="application/json")
