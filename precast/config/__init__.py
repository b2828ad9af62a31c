"""Settings: their types, sources and defaults."""
