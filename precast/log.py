"""One log format for every service: structlog, on stderr, for people or as JSON lines.

Standard-library loggers (uvicorn, grpc, ...) go through the same formatter. Usage::

    log = precast.log.get_logger(__name__)
    log.info("graph loaded", num_tokens=4, load_ms=11.8)

Events are short phrases without values in them; values are keywords with their unit in the name.
"""

import logging
import sys
from typing import TYPE_CHECKING, Protocol, cast

import structlog

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

_QUIET = ("asyncio", "grpc", "httpx", "httpcore", "urllib3", "uvicorn.access")


class LogSettings(Protocol):
    """The part of the settings that logging needs."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> str: ...


def get_logger(name: str) -> "FilteringBoundLogger":
    """A logger whose events carry ``component=name``."""
    return cast("FilteringBoundLogger", structlog.get_logger(component=name))


def configure(service: str, settings: LogSettings) -> None:
    """Set up logging of this process; every event carries ``service``. May be called again."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared = _shared_processors(service)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(settings.log_format),
            ],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _shared_processors(service: str) -> list["Processor"]:
    def add_service(
        _logger: object, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event.setdefault("service", service)
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
    ]


def _renderers(log_format: str) -> list["Processor"]:
    if log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain),
    ]
