"""How far a graph may be from eager."""

EXACT_BOUND = 1e-4
QUANTIZED_BOUND = 3e-2
"""Largest |graph - eager| / max |eager| of logits and cache entries.

fp32 sums come out in another order: about 1e-6 was seen. With quantised activations or a
quantised cache such a difference can move a value across a rounding step, 1/127 of a row's largest:
up to 6e-3 was seen."""
