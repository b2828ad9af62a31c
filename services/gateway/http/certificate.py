"""The gateway's certificate for HTTPS: checked before use, and read again when it changes."""

import ssl
from pathlib import Path
from typing import Final

from precast.errors import ConfigError
from precast.log import get_logger
from precast.system.file_state import file_state

log = get_logger(__name__)


class Certificate:
    """A certificate and its key, in two files."""

    def __init__(self, certificate: Path, key: Path | None) -> None:
        self._certificate: Final = certificate
        self._key: Final = key
        self._files: Final = tuple(path for path in (certificate, key) if path is not None)
        self._read = file_state(self._files)

    def check(self) -> None:
        """Raises ``ConfigError``."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._load(context)
        except OSError as error:  # ssl's errors too
            raise ConfigError(
                f"https_certificate {self._certificate}, https_key {self._key}: "
                f"{error.strerror or error}"
            ) from None

    def renew(self, context: ssl.SSLContext) -> None:
        """Has connections that begin from now on see the files as they are now. What can't be used
        leaves everything as it is."""
        state = file_state(self._files)
        if state in (self._read, ()):  # those that are away have not changed yet
            return
        self._read = state
        try:
            self.check()  # a context keeps what it could read of a pair that doesn't fit
            self._load(context)
        except (ConfigError, OSError) as error:
            log.error("new certificate not used", reason=str(error))
        else:
            log.info("new certificate", file=str(self._certificate))

    def _load(self, context: ssl.SSLContext) -> None:
        """Without asking a terminal for a password: a key that has one can't be used."""
        context.load_cert_chain(self._certificate, self._key, password=lambda: "")
