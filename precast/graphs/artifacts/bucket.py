"""A prefix of an S3 bucket: objects by name, with deadlines and bounded retries.

Credentials, region and endpoint come from the variables that AWS's own tools read
(``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ...).
Objects that aren't there raise ``FileNotFoundError``; a bucket that doesn't answer, or refuses,
raises ``StoreUnavailable``.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from precast.errors import ArtifactRejected, StoreUnavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta

PART_BYTES: Final = 8 << 20
"""Larger objects travel in parts of this size, each with a deadline of its own."""
_REQUEST_S: Final = timedelta(seconds=10)
_CONNECT_S: Final = timedelta(seconds=3)
_RETRIES: Final = 4
_RETRY_S: Final = timedelta(seconds=15)


class Bucket:
    def __init__(self, url: str) -> None:
        """``url``: s3://bucket/prefix."""
        self.url = url
        parts = urlsplit(url)
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        self._client = S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            client_options={
                "allow_http": plain,
                "timeout": _REQUEST_S,
                "connect_timeout": _CONNECT_S,
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_S},
        )

    def listing(self, prefix: str | None = None) -> "list[ObjectMeta]":
        with self._reached():
            return [meta for page in obstore.list(self._client, prefix) for meta in page]

    def create(self, name: str, content: bytes) -> bool:
        """Write an object that isn't there; whether it wasn't."""
        with self._reached():
            try:
                obstore.put(self._client, name, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def write(self, name: str, content: bytes) -> None:
        with self._reached():
            obstore.put(self._client, name, content, use_multipart=False)

    def read(self, name: str, limit: int) -> bytes:
        """Raises ``ArtifactRejected`` for an object of more than ``limit`` bytes."""
        with self._reached():
            result = obstore.get(self._client, name)
            if result.meta["size"] > limit:
                raise ArtifactRejected(f"{name} exceeds {limit} bytes")
            return bytes(result.bytes())

    def read_tagged(self, name: str, limit: int) -> tuple[bytes | None, str | None]:
        """An object and the tag of its present state: no tag where there is no object, no content
        where it has more than ``limit`` bytes."""
        with self._reached():
            try:
                result = obstore.get(self._client, name)
            except FileNotFoundError:
                return None, None
            fits = result.meta["size"] <= limit
            return bytes(result.bytes()) if fits else None, result.meta["e_tag"]

    def replace(self, name: str, content: bytes, tag: str | None) -> bool:
        """Write an object if its state is that of the tag; whether it was."""
        if tag is None:
            return self.create(name, content)
        with self._reached():
            try:
                obstore.put(self._client, name, content, mode={"e_tag": tag}, use_multipart=False)
            except PreconditionError:
                return False
            return True

    def delete(self, names: Iterable[str]) -> None:
        """No error for what isn't there."""
        with self._reached():
            if paths := list(names):
                obstore.delete(self._client, paths)

    def upload(self, name: str, path: Path) -> None:
        with self._reached():
            obstore.put(self._client, name, path, chunk_size=PART_BYTES)

    def download(self, name: str, path: Path, size: int) -> None:
        """Into a new file. Raises ``ArtifactRejected`` for an object of another size."""
        with self._reached(), path.open("xb") as file:
            found = obstore.head(self._client, name)["size"]
            if found != size:
                raise ArtifactRejected(f"{name} has {found} bytes, its manifest says {size}")
            for start in range(0, size, PART_BYTES):
                end = min(start + PART_BYTES, size)
                file.write(obstore.get_range(self._client, name, start=start, end=end))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            reason = str(error).partition("\n")[0]
            raise StoreUnavailable(f"{self.url}: {reason[:300]}") from None
