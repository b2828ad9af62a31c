"""The password of Redis out of a file."""

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit


def password_in(path: Path) -> str:
    """What a file holds in its one line. Raises ``ValueError``."""
    try:
        found = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(str(error.strerror)) from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    if len(found.splitlines()) != 1:
        raise ValueError("must hold one line, the password")
    return found


def with_password(url: str, password: str) -> str:
    """The URL, whose user gets a password. Raises ``ValueError`` if it has another one."""
    parts = urlsplit(url)
    if parts.password and unquote(parts.password) != password:
        raise ValueError("has a password itself, and another one than redis_password_file")
    name, _, host = parts.netloc.rpartition("@")
    user = name.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def without_password(url: str) -> str:
    """The URL as it is before ``with_password``."""
    login, _, host = (netloc := urlsplit(url).netloc).rpartition("@")
    user = login.partition(":")[0]
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{f'{user}@' if user else ''}{host}{rest[len(netloc) :]}"
