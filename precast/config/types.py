"""Types of settings that flags and environment give as text and a file may give as lists."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_settings import NoDecode

from precast.rpc.address import Address
from precast.system.process import parse_cpus
from precast.system.redis_password import password_in, with_password


def absolute(path: Path) -> Path:
    """With ``~`` expanded, relative to the working directory of the start."""
    return _of_start(path, lambda path: path.expanduser().resolve())


def _unresolved(path: Path) -> Path:
    """The same, with its links: whoever renews what they lead to makes them lead elsewhere, as
    mounts of secrets do."""
    return _of_start(path, lambda path: path.expanduser().absolute())


def _of_start(path: Path, made: Callable[[Path], Path]) -> Path:
    try:
        return made(path)
    except (RuntimeError, OSError) as error:  # no home folder is known, or a loop of links
        raise ValueError(str(error)) from None


def _split(value: object) -> object:
    """``"1, 2"`` to ``["1", "2"]``; anything else as it is."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _cores(value: object) -> object:
    return parse_cpus(value) if isinstance(value, str) and value.strip() else _split(value)


MAX_BUCKET = 8192


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes:
        raise ValueError("must be different sizes of at least 1")
    return _buckets(sizes)


def _buckets(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if sizes and (min(sizes) < 1 or len(set(sizes)) != len(sizes)):
        raise ValueError("must be different sizes of at least 1")
    if sizes and max(sizes) > MAX_BUCKET:
        raise ValueError(f"must be sizes of at most {MAX_BUCKET}")
    return tuple(sorted(sizes))


def _address(value: str) -> str:
    Address.parse(value)
    return value


def _origin(value: str) -> str:
    parts = urlsplit(value)
    plain = parts.scheme in ("http", "https") and parts.netloc and not parts.path
    if value != "*" and not (plain and value == f"{parts.scheme}://{parts.netloc}"):
        raise ValueError(f"{value!r} must be an origin such as https://app.example.com, or *")
    return value


def _redis_url(value: str) -> str:
    if not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    return value


def _with_its_password(value: str, info: ValidationInfo) -> str:
    file = info.data.get("redis_password_file")
    return value if file is None else with_password(value, password_in(file))


def _password_file(path: Path) -> Path:
    try:
        password_in(path)
    except ValueError as error:
        raise ValueError(f"a file with a password: {error}") from None
    return path


def _otlp_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError("must be http://host:port or https://host:port")
    return value


def _store_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or parts.query:
        raise ValueError("must be s3://bucket or s3://bucket/prefix")
    return value.rstrip("/")


# NoDecode: pydantic-settings would otherwise want JSON in an environment variable.
BatchSizes = Annotated[
    tuple[int, ...], NoDecode, BeforeValidator(_split), AfterValidator(_ascending)
]
Buckets = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split), AfterValidator(_buckets)]
"""Like ``BatchSizes``, but there may be none."""
Cores = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_cores)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Origins = Annotated[
    tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_split)
]
AddressText = Annotated[str, AfterValidator(_address)]
RedisUrl = Annotated[str, AfterValidator(_redis_url), AfterValidator(_with_its_password)]
OtlpUrl = Annotated[str, AfterValidator(_otlp_url)]
StoreUrl = Annotated[str, AfterValidator(_store_url)]
AbsolutePath = Annotated[Path, AfterValidator(absolute)]
RenewedPath = Annotated[Path, AfterValidator(_unresolved)]
PasswordFile = Annotated[Path, AfterValidator(absolute), AfterValidator(_password_file)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1)]
