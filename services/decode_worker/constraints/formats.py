"""Formats of strings that are written as patterns: dates, of which llguidance has leap seconds in
any minute and the 29th of February in any year, addresses, whose masks are then known
(``patterns``), and formats that llguidance does not know."""

import json
from typing import Any, Final

from services.decode_worker.constraints.addresses import EMAIL, HOSTNAME, URI

_YEAR_4: Final = r"(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
"""Divisible by 4, and if by 100, then by 400 too."""
_DATE: Final = (
    r"(\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))|" + _YEAR_4 + "-02-29)"
)
_TIME: Final = (
    r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"  # no :60
)
_BASE64: Final = "([{0}]{{4}})*([{0}]{{2}}==|[{0}]{{3}}=)?"
_BASE64_URL: Final = "([{0}]{{4}})*([{0}]{{2}}(==)?|[{0}]{{3}}=?)?"
_HEX: Final = "[0-9a-fA-F]"
_UUIDS: Final = {
    f"uuid{digit}": f"^{_HEX}{{8}}-{_HEX}{{4}}-{digit}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}$"
    for digit in range(1, 9)
}
"""As pydantic calls UUIDs of one version."""
_PATTERNS: Final = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
    "email": f"^{EMAIL}$",
    "hostname": f"^{HOSTNAME}$",
    "uri": f"^{URI}$",
    "byte": f"^{_BASE64.format('A-Za-z0-9+/')}$",  # OpenAPI's name
    "base64": f"^{_BASE64.format('A-Za-z0-9+/')}$",
    "base64url": f"^{_BASE64_URL.format('A-Za-z0-9_-')}$",
    **_UUIDS,
}
_VALUES: Final = frozenset({"const", "enum", "default", "examples"})
"""Keywords behind which there are values, and no schemas."""
_NAMED: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
"""Keywords behind which there are schemas by name."""


def with_strict_formats(schema: str) -> str:
    """A schema, JSON as text, with patterns in the place of these formats."""
    if '"format"' not in schema:
        return schema
    return json.dumps(_strict(json.loads(schema)))


def _strict(part: Any) -> Any:
    """A schema, or several."""
    if isinstance(part, list):
        return [_strict(each) for each in part]
    if not isinstance(part, dict):
        return part
    found = {key: _strict_behind(key, value) for key, value in part.items()}
    name = found.get("format")
    if isinstance(name, str) and name in _PATTERNS and "pattern" not in found:
        found["pattern"] = _PATTERNS[found.pop("format")]
    return found


def _strict_behind(key: str, value: Any) -> Any:
    if key in _VALUES:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: _strict(schema) for name, schema in value.items()}
    return _strict(value)
