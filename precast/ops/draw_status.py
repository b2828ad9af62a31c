"""What becomes of a row that is sampled. Without torch, for those who only read it."""

import enum
from typing import Final


class DrawStatus(enum.IntEnum):
    """As the operator returns it (``csrc/sampling.h``)."""

    DRAWN = 0
    NOT_FINITE = 1
    NOTHING_LEFT = 2
    BAD_TOKEN = 3

    @property
    def message(self) -> str:
        """For whoever asked for the token."""
        return _MESSAGES[self]


_MESSAGES: Final = {
    DrawStatus.DRAWN: "a token was drawn",
    DrawStatus.NOT_FINITE: "the model's logits are NaN or infinite",
    DrawStatus.NOTHING_LEFT: "no token is left: every logit is -inf",
    DrawStatus.BAD_TOKEN: "a token id of bias or penalties is outside of the vocabulary",
}
