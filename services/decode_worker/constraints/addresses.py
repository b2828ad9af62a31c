"""Addresses as patterns: what RFC 5321 says of mailboxes, RFC 1123 of hosts, RFC 3986 of URIs."""

from typing import Final

_ALNUM: Final = "A-Za-z0-9"
_HEX: Final = "[0-9A-Fa-f]"
_ATOM: Final = f"[{_ALNUM}!#$%&'*+/=?^_`{{|}}~-]"
_MAILBOX: Final = rf"(?:{_ATOM}(?:\.?{_ATOM}){{0,31}}|{_ATOM}{{1,64}})"
"""Of 64 characters at most, with dots of 32 beside them: so far a pattern can count."""


def _label() -> str:
    """Of 63 characters at most, the third and the fourth of which are not both hyphens: of such
    labels a pattern can't tell which are valid."""
    end, sign = f"[{_ALNUM}]", f"[{_ALNUM}-]"
    without, first_only = f"{end}{sign}{{0,59}}{end}", f"-{end}(?:{sign}{{0,58}}{end})?"
    return f"{end}(?:{sign}?{end}|{sign}(?:{without}|{first_only}))?"


_HOST: Final = rf"{_label()}(?:\.{_label()})*"
_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = rf"(?:{_OCTET}\.){{3}}{_OCTET}"

_REST: Final = f"{_ALNUM}._~!$&'()*+,;="
"""Of what may stand in names of URIs, but for what parts add and ``-``."""


def _several(more: str) -> str:
    """A character of a part of a URI, spelled or by its number."""
    return f"(?:[{_REST}{more}-]|%{_HEX}{{2}})"


_GROUP: Final = f"{_HEX}{{1,4}}"


def _ipv6() -> str:
    """Eight groups, or fewer on either side of a gap."""
    cases = [f"(?:{_GROUP}:){{7}}{_GROUP}"]
    for left in range(8):
        before = f"{_GROUP}(?::{_GROUP}){{{left - 1}}}" if left else ""
        behind = f"(?:{_GROUP}(?::{_GROUP}){{0,{6 - left}}})?" if left < 7 else ""
        cases.append(f"{before}::{behind}")
    return "|".join(cases)


def _uri() -> str:
    part = _several(":@")
    host = rf"(?:\[(?:{_ipv6()}|v{_HEX}+\.[{_REST}:-]+)\]|{_several('')}*)"
    authority = f"(?:{_several(':')}*@)?{host}(?::[0-9]*)?"
    absolute = f"/(?:{part}+(?:/{part}*)*)?"
    path = f"(?://{authority}(?:/{part}*)*|{absolute}|{part}+(?:/{part}*)*)?"
    behind = f"(?:{_several(':@/?')})*"
    return rf"[A-Za-z][{_ALNUM}+.-]*:{path}(?:\?{behind})?(?:#{behind})?"


EMAIL: Final = rf"{_MAILBOX}@(?:{_HOST}|\[{_IPV4}\])"
HOSTNAME: Final = _HOST
URI: Final = _uri()
