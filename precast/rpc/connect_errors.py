"""Why a connection could not be made, in words: gRPC quotes its libraries' codes, or says that a
socket was closed."""

from typing import Final

_BEGINNING: Final = "failed to connect to all addresses"
_CAUSES: Final = (
    ("WRONG_VERSION_NUMBER", "it speaks without TLS, but tls_dir is set"),
    ("ALERT_CERTIFICATE_EXPIRED", "it says that our certificate has expired"),
    ("certificate has expired", "its certificate has expired"),
    ("certificate is not yet valid", "its certificate is not valid yet"),
    ("BAD_SIGNATURE", "its certificate is not of the authority in tls_dir"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of the authority in tls_dir"),
    ("ALERT_UNKNOWN_CA", "it knows another authority than that of our certificate"),
    ("Connection refused", "nobody listens there"),
    ("Socket closed", "it closed the connection; it may want a certificate (tls_dir)"),
)
"""Parts of what gRPC says, and what they mean."""


def clear(detail: str) -> str:
    """What a failed call says, shorter where its cause is known."""
    if not detail.startswith(_BEGINNING):
        return detail
    cause = next((told for part, told in _CAUSES if part in detail), "")
    return f"can't connect: {cause}" if cause else detail
