"""What operators look at, on a port of its own: metrics, the API's reference, health."""

import json
from collections.abc import Callable
from functools import cache

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from precast.config.settings import GatewaySettings
from services.gateway.http.paths import Paths
from services.gateway.metrics import Metrics
from services.gateway.on_demand import Models
from services.gateway.openai import errors
from services.gateway.openai.reference import document
from services.gateway.routing.pool import WorkerPool


def private_app(
    metrics: Metrics, pool: WorkerPool, models: Models, reference: Callable[[], bytes]
) -> FastAPI:
    """The app of ``metrics_port``."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    errors.install(app)
    app.routes.extend(health_routes(pool, models).routes)
    app.routes.extend(reference_routes(reference).routes)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs")
    async def docs() -> Response:
        return get_swagger_ui_html(openapi_url="/openapi.json", title="Precast")

    return app


def reference_of(settings: GatewaySettings) -> Callable[[], bytes]:
    """What gives the API's reference as JSON. Made when it is first wanted: that takes 0.26 s, two
    thirds of a gateway's start."""

    @cache
    def reference() -> bytes:
        return json.dumps(document(keeps_responses=settings.responses_lifetime_s > 0)).encode()

    return reference


def reference_routes(reference: Callable[[], bytes]) -> Paths:
    """``/openapi.json``, on both ports."""
    router = Paths()

    @router.get("/openapi.json")
    def openapi(_: Request) -> Response:  # on a thread: making it must not hold up streams
        return Response(reference(), media_type="application/json")

    return router


def health_routes(pool: WorkerPool, models: Models) -> Paths:
    """``/health`` and ``/ready``, on both ports."""
    router = Paths()

    @router.get("/health")
    async def health(_: Request) -> Response:
        """The process answers; says nothing of workers."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready(_: Request) -> Response:
        """A worker is ready, or can be started."""
        count = sum(worker.ready for worker in pool.workers)
        if not count and not models.startable:
            raise errors.unavailable("No worker is ready.", "not_ready")
        connected = sum(worker.connection.up for worker in pool.workers)
        counts = {"workers": count, "connected": connected}
        return JSONResponse({"status": "ready", **counts, "models": list(pool.models)})

    return router
