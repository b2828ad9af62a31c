"""The first thing that a service does: its log, and every setting with where it comes from."""

import signal
import sys
from types import FrameType

from precast import log as logging
from precast.config.settings import CommonSettings, describe


def announce(service: str, settings: CommonSettings) -> None:
    """Log the settings before anything heavy is loaded."""
    # until the service handles signals itself, one ends it without a traceback
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    logging.configure(service, settings)
    log = logging.get_logger(__name__)
    for name, value, source in describe(settings):
        log.info("setting", name=name, value=value, source=source)


def _stop(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
