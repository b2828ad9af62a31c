"""gRPC servers, channels and health checks."""
