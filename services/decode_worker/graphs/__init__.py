"""Which graphs a worker replays, and where they come from."""
