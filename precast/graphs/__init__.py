"""Captured graphs: their keys, artifacts, signatures, store, capture and replay."""
