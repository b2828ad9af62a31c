"""Checkpoints whose linears are quantised: a module a scheme, which knows its tensors' names,
shapes and bits. ``recognise.py`` finds the scheme that a ``config.json`` names."""
