"""Sums of prompts' hidden states, of which the leader makes embeddings."""

import numpy as np
import torch
from torch import Tensor

from precast.models.layers import Shape, rms_norm
from precast.models.load import Weights
from services.decode_worker.ranks.protocol import PooledRows


def pool(shape: Shape, weights: Weights, hidden: Tensor, wanted: PooledRows) -> bytes:
    """Of stretches of hidden states [T, H], normed as the head's are; float64 [P, H]."""
    firsts, counts = (
        np.frombuffer(column, dtype=np.int32).tolist() for column in (wanted.firsts, wanted.counts)
    )
    sums = [
        _sum(shape, weights, hidden[first : first + count])
        for first, count in zip(firsts, counts, strict=True)
    ]
    return torch.stack(sums).numpy().tobytes()


def _sum(shape: Shape, weights: Weights, hidden: Tensor) -> Tensor:
    normed = rms_norm(hidden.contiguous(), weights.head.norm, shape.rms_norm_eps)
    return normed.double().sum(0)
