"""Operators of a decode and prefill step: ``torch.ops.precast.*``.

Import :mod:`precast.ops.native` to register them.
"""
