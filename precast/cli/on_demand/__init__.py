"""Models that run while they are asked for: ``serve --models-on-demand``."""
