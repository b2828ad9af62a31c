"""Graphs as signed artifacts: manifests, trust, stores, caches, bundles."""
