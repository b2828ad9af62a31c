"""The FastAPI application: its parts, and what each request passes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import getpid
from socket import gethostname
from typing import Final

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from precast.access.api_keys import KeyRing
from precast.config.settings import GatewaySettings
from precast.fleet.leases import Registry
from precast.rpc.tls import Role, Tls
from precast.telemetry import Tracer, open_tracer
from precast.tokenizer.model_tokenizer import TokenizerStore
from services.gateway.access.guard import Guard
from services.gateway.access.quota import Quota
from services.gateway.in_flight import InFlight
from services.gateway.metrics import Metrics
from services.gateway.middleware import Admission, Leniency, PrivatePort, RequestIds
from services.gateway.on_demand import models_of
from services.gateway.openai import errors
from services.gateway.openai.prepare import Parsers, Planner
from services.gateway.openai.responses_api.conversation import Conversations
from services.gateway.openai.responses_api.store import ResponseStore
from services.gateway.operations import health_routes, private_app, reference_of, reference_routes
from services.gateway.request_id import HEADER as REQUEST_ID
from services.gateway.routes import (
    IGNORED,
    Bodies,
    generation_routes,
    kept_routes,
    model_routes,
    token_routes,
)
from services.gateway.routing.pool import WorkerPool
from services.gateway.sole_model import SoleModel
from services.gateway.tracing import Traces

_POSTS: Final = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/v1/messages/count_tokens", "/v1/embeddings", "/tokenize", "/detokenize"),
)
_FREE: Final = ("/health", "/ready")
"""What load balancers ask, who have no key."""


class _App(FastAPI):
    """Without what FastAPI puts around each request for its own routes: here are plain ones."""

    def build_middleware_stack(self) -> ASGIApp:
        return Starlette.build_middleware_stack(self)


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
    models = models_of(settings, pool)
    quota = Quota(settings.redis_url)
    conversations = _conversations(settings)
    tracer = open_tracer(
        settings.otlp_endpoint, service="precast-gateway", instance=f"{gethostname()}-{getpid()}"
    )
    _watch_workers(metrics, pool)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            async with models:
                yield
        finally:
            await pool.close()
            await quota.close()
            await conversations.close()
            if tracer is not None:
                await tracer.close()
            await registry.close()

    app = _App(lifespan=lifespan, openapi_url=None, redirect_slashes=False)

    async def end_requests() -> None:
        models.end()
        await pool.end_requests()

    app.state.end_requests = end_requests
    errors.install(app)
    keys = KeyRing(folder=settings.api_keys_dir)
    app.add_middleware(Guard, keys=keys, quota=quota, free=_FREE)
    _add_middleware(app, settings, metrics, in_flight or InFlight(), tracer)
    reference = reference_of(settings)
    if private_port is not None:
        private = private_app(metrics, pool, models, reference)
        app.add_middleware(PrivatePort, private=private, port=private_port)
    parsers = Parsers(
        tools=settings.tool_parser,
        reasoning=settings.reasoning_parser,
        allow_control_tokens=settings.allow_control_tokens,
    )
    sole = SoleModel(pool, models)
    bodies = Bodies(settings, metrics, keys, sole)
    planner = Planner(pool, TokenizerStore(settings.models_dir), parsers)
    for paths in (
        generation_routes(planner, pool, metrics, settings, bodies, conversations, models),
        kept_routes(conversations),
        token_routes(planner, bodies, models, sole),
        model_routes(pool, models),
        health_routes(pool, models),
        reference_routes(reference),
    ):
        app.routes.extend(paths.routes)
    return app


def _add_middleware(
    app: FastAPI,
    settings: GatewaySettings,
    metrics: Metrics,
    in_flight: InFlight,
    tracer: Tracer | None,
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
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,  # pages of the internet, at a gateway that is not in it
            expose_headers=("retry-after", REQUEST_ID, IGNORED),
        )
    if tracer is not None:
        app.add_middleware(Traces, tracer=tracer, endpoints=_POSTS, free=_FREE)
    app.add_middleware(Leniency)
    app.add_middleware(RequestIds, access_log=settings.access_log)


def _conversations(settings: GatewaySettings) -> Conversations:
    lifetime_s, room = settings.responses_lifetime_s, settings.responses_max_mb << 20
    if not lifetime_s:
        return Conversations(None)
    return Conversations(ResponseStore(settings.redis_url, lifetime_s=lifetime_s, max_bytes=room))


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
