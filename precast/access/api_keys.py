"""API keys: who may use the gateway, and how much of it.

A key is a file ``<id>.json`` in a folder; what it holds of the key itself is a SHA-256 digest.
That is enough for a secret of 256 random bits: nobody guesses it, so a slow hash would protect
nothing. Gateways follow the folder: a file that is put there counts within a second, one that is
deleted counts no more. Where there is no folder no key is asked for; where there is one, or was one
since the start, the API is closed to all who have none.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from precast.access.files import write_whole
from precast.errors import ConfigError
from precast.log import get_logger

log = get_logger(__name__)

Limit = Annotated[int, Field(ge=1)]
_SECRET_BYTES: Final = 32
_LOOK_S: Final = 0.5
_LIST_S: Final = 5.0
"""How often files are looked at that may have been changed in place: a thousand take some ms."""
_SETTLED_S: Final = 1.0
"""More than file systems' clocks tick in."""
_FILES: Final = "[!.]*.json"
"""Not those that are being written."""
_File = tuple[str, int, int, int]
_PARTS: Final = re.compile(r"pk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NO_DIGEST: Final = "0" * 64


class Scope(StrEnum):
    """What a key is for."""

    INFERENCE = "inference"
    ADMIN = "admin"


class ApiKey(BaseModel):
    """What is known of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")
    """Whose it is, for people."""
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the secret, in hexadecimal digits."""
    scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Of prompts and answers together."""
    max_concurrent: Limit | None = None
    """Requests at once."""
    created: int
    """Seconds since 1970."""


def create(folder: Path, key: "NewKey") -> tuple[str, ApiKey]:
    """Make a key; what its owner has to send, shown this once, and what is kept. Raises
    ``ConfigError``."""
    identifier, secret = secrets.token_hex(6), secrets.token_urlsafe(_SECRET_BYTES)
    try:
        kept = ApiKey(
            id=identifier,
            digest=_digest(secret),
            created=int(time.time()),
            **key.__dict__,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None
    _write(folder / f"{identifier}.json", kept.model_dump_json(indent=2, exclude_none=True))
    return f"pk_{identifier}_{secret}", kept


@dataclass(frozen=True, kw_only=True)
class NewKey:
    """What whoever makes a key decides; as in ``ApiKey``."""

    name: str
    scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


def load(folder: Path) -> list[ApiKey]:
    """All keys of a folder by age; a file that is none is left out, with a line in the log."""
    return sorted(filter(None, map(_read, folder.glob(_FILES))), key=lambda key: key.created)


def revoke(folder: Path, beginning: str) -> ApiKey:
    """Delete the one key whose id begins so. Raises ``ConfigError``."""
    found = [key for key in load(folder) if beginning and key.id.startswith(beginning)]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} API keys have an id that begins with {beginning!r}")
    try:
        (folder / f"{found[0].id}.json").unlink()
    except OSError as error:
        raise ConfigError(f"api_keys_dir {error.filename}: {error.strerror}") from None
    return found[0]


@dataclass(kw_only=True)
class KeyRing:
    """The keys of a folder as they are now."""

    folder: Path
    _keys: dict[str, ApiKey] | None = None
    _files: frozenset[_File] | None = None
    """That the keys were read from."""
    _changed_ns: int = -1
    """When the folder was changed, the last time that it was looked at."""
    _settled: float = field(default=float("-inf"))
    """When one more change would have another time (monotonic, s)."""
    _looked: float = field(default=float("-inf"))
    _listed: float = field(default=float("-inf"))
    """When the folder, and all of its files, were looked at last (monotonic, s)."""

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return self._now() is None

    def find(self, sent: str) -> ApiKey | None:
        """The key that somebody has sent, if it is one. Takes as long for a wrong secret as for an
        unknown id."""
        parts = _PARTS.fullmatch(sent)
        identifier, secret = parts.groups() if parts else ("", "")
        key = self._known(identifier)
        right = hmac.compare_digest(_digest(secret), key.digest if key else _NO_DIGEST)
        return key if right else None

    def _known(self, identifier: str) -> ApiKey | None:
        """Looks at once for an id that is not known: its key may have been made just now."""
        if identifier not in (self._now() or {}) and self._has_changed():
            self._looked = float("-inf")
        return (self._now() or {}).get(identifier)

    def _has_changed(self) -> bool:
        """Whether the folder may have. Costs little: whoever invents keys can have it asked."""
        try:
            changed_ns = self.folder.stat().st_mtime_ns
        except OSError:
            return True
        return changed_ns != self._changed_ns or time.monotonic() < self._settled

    def _now(self) -> dict[str, ApiKey] | None:
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            self._look()
        return self._keys

    def _look(self) -> None:
        try:
            if time.monotonic() - self._listed < _LIST_S and not self._has_changed():
                return
            changed_ns = self.folder.stat().st_mtime_ns
            files = _files(self.folder)
            self._listed = time.monotonic()
        except FileNotFoundError:
            self._is_away()
        except OSError as error:  # closed, rather than open to all
            log.error("api keys can't be read", folder=str(self.folder), reason=error.strerror)
            self._close()
        else:
            if changed_ns != self._changed_ns:
                self._changed_ns, self._settled = changed_ns, time.monotonic() + _SETTLED_S
            if files != self._files or self._keys is None:
                self._keys, self._files = {key.id: key for key in load(self.folder)}, files

    def _is_away(self) -> None:
        """A file of the folder is, or all of it. A folder that was there is put in another's place,
        or mounted anew: nobody asked for an API that is open to all."""
        if self.folder.exists():
            self._looked = float("-inf")
        elif self._keys:
            log.error(
                "the folder of api keys is gone: no key opens anything", folder=str(self.folder)
            )
            self._close()

    def _close(self) -> None:
        """To all, until the folder is read again."""
        self._keys, self._files, self._listed = {}, None, float("-inf")


def _files(folder: Path) -> frozenset[_File]:
    """What changes with the keys. Raises ``OSError``."""
    with os.scandir(folder) as entries:
        return frozenset(map(_file, entries))


def _file(entry: "os.DirEntry[str]") -> _File:
    found = entry.stat()
    return entry.name, found.st_ino, found.st_size, found.st_mtime_ns


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _read(path: Path) -> ApiKey | None:
    try:
        key = ApiKey.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a key"
        log.error("api key left out", file=path.name, reason=reason)
        return None
    return key if path.stem == key.id else None


def _write(path: Path, text: str) -> None:
    """A file for the owner alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, f"{text}\n".encode(), 0o600)
    except OSError as error:
        raise ConfigError(f"api_keys_dir {error.filename}: {error.strerror}") from None
