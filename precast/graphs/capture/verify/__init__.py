"""Compares a captured graph with eager steps."""
