"""Captures run in child processes with limits."""
