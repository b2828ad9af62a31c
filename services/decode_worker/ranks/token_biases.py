"""What is added to a sequence's logits: its bias, and -inf where no token may end it yet."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.decode_worker.ranks.protocol import StartSampling


@dataclass(frozen=True, kw_only=True, eq=False)
class Bias:
    """Compared by identity."""

    ids: NDArray[np.int32]
    values: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SlotBias:
    """Of one sequence."""

    early: Bias
    """Before it has ``min_tokens``."""
    later: Bias
    min_tokens: int

    def at(self, drawn: int) -> Bias:
        """What counts for a draw behind so many."""
        return self.early if drawn < self.min_tokens else self.later


NO_BIAS: Final = Bias(ids=np.empty(0, dtype=np.int32), values=np.empty(0, dtype=np.float32))


def slot_bias(message: StartSampling) -> SlotBias:
    later = Bias(
        ids=np.frombuffer(message.bias_token_ids, dtype=np.int32),
        values=np.frombuffer(message.bias_values, dtype=np.float32),
    )
    endings = np.frombuffer(message.ending_token_ids, dtype=np.int32)
    early = without(later, endings)
    return SlotBias(early=early, later=later, min_tokens=message.min_tokens)


def without(bias: Bias, tokens: NDArray[np.int32]) -> Bias:
    """The same, and none of the tokens is drawn."""
    if not tokens.size:
        return bias
    return Bias(
        ids=np.concatenate((bias.ids, tokens)),
        values=np.concatenate((bias.values, np.full(len(tokens), -np.inf, dtype=np.float32))),
    )
