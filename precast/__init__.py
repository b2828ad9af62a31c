"""Precast: decode out of precompiled graphs, served over an OpenAI-compatible HTTP API."""

import os

__version__ = "0.2.0"

# gRPC's C core logs to stderr on its own; below ERROR it is about every connection that ends. It
# reads this when it is imported, so it must be set before.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
