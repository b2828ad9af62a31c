"""Models into the home folder: the catalog, and what can be imported."""
