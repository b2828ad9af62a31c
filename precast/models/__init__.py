"""Models: import, configuration, weights and the readable reference of each architecture."""
