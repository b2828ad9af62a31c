"""What HTTP clients of services without certificates are given."""

import ssl
from typing import Final

PLAIN: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For httpx's ``verify``. Without it each client, and each call outside of one, reads the system's
certificates first: 45 ms of processor time, where a request takes 2."""
