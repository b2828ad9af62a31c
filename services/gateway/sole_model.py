"""The model of requests that name none: the only one that is served."""

from typing import Final

from precast.errors import WorkerUnavailable
from services.gateway.on_demand import Models
from services.gateway.openai.errors import ApiError, invalid
from services.gateway.routing.pool import WorkerPool

_MAX_NAMED: Final = 8


class SoleModel:
    def __init__(self, pool: WorkerPool, models: Models) -> None:
        self._pool = pool
        self._models = models

    async def name(self) -> str:
        """An adapter is no model of its own, one that can be started is. Raises ``ApiError``, or
        ``WorkerUnavailable`` where the models that were served are gone, or who starts them is."""
        if self._models.lost:  # which ones there are is not known
            raise WorkerUnavailable("No model can be started at the moment.")
        startable = (await self._models.listed()).values()
        names = set(self._pool.bases) | {one.name for one in startable if not one.parent}
        if len(names) > 1:
            raise _several(sorted(names))
        if names:
            return names.pop()
        if self._pool.has_served:
            raise WorkerUnavailable("No worker is ready to serve a model.")
        raise ApiError(404, "No model is served.", param="model", code="model_not_found")


def _several(names: list[str]) -> ApiError:
    more = ", …" if len(names) > _MAX_NAMED else ""
    reason = f"{len(names)} models are served: {', '.join(names[:_MAX_NAMED])}{more}"
    return invalid(f"Missing required parameter: 'model' ({reason}).", "model")
