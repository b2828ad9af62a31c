"""One sequence of tokens: its prompt, what was generated, and what of it is in the KV cache."""

import enum
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from blake3 import blake3

from services.decode_worker.constraints.matcher import Matcher
from services.decode_worker.engine.pooling import Pooling
from services.decode_worker.engine.speculation import Drafting

_SALT_CONTEXT: Final = "precast prefix cache salt"
_ADAPTER_CONTEXT: Final = "precast prefix cache adapter"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How a request's tokens are drawn, for its whole life (``ranks.protocol.StartSampling``)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int = -1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias_token_ids: bytes = b""
    """int32."""
    bias_values: bytes = b""
    """float32."""
    min_tokens: int = 0
    """Tokens before which none of ``ending_token_ids`` is drawn."""
    ending_token_ids: bytes = b""
    """int32."""
    banned_sequences: tuple[bytes, ...] = ()
    """int32 each."""

    @property
    def looks_back(self) -> bool:
        """Whether what was drawn before changes what is drawn next, beyond the logits."""
        penalties = self.presence_penalty or self.frequency_penalty
        return bool(self.repetition_penalty != 1 or penalties or self.banned_sequences)

    def is_likeliest(self, drawn: int) -> bool:
        """Whether the likeliest token is wanted as it stands, and nothing else, behind so many."""
        changed = self.temperature or self.bias_token_ids or self.looks_back
        return not (changed or self.logprobs >= 0 or drawn < self.min_tokens)


@dataclass(kw_only=True, eq=False)
class Sequence:
    request_id: str
    prompt: list[int]
    sampling: SamplingSpec
    max_tokens: int
    stop_token_ids: frozenset[int]
    prompt_only: bool = False
    """Only the prompt's log-probabilities or its embedding are wanted: what is drawn is dropped."""
    priority: int = 0
    """Higher ones get slots first."""
    cache_salt: str = ""
    """Blocks are shared only with sequences of the same one."""
    adapter: int = 0
    """Its place among the worker's, from 1 on; 0: none. Blocks are shared likewise."""
    output: list[int] = field(default_factory=list)
    resumed: int = 0
    """Tokens of the output that the sequence began with."""
    drawing: int = 0
    """Tokens that steps under way draw: they follow the output, and are not known yet."""
    computed: int = 0
    """Tokens whose keys and values are in the cache, or will be when steps under way are over."""
    computing: int = 0
    """Tokens that steps under way compute, those of drafts too. It is as many when the sequence is
    preempted meanwhile."""
    matcher: Matcher | None = None
    """Where its output stands in the grammar that it has to follow."""
    prompt_logprobs: int = -1
    """Alternatives to report for each token of the prompt; -1: it is not scored."""
    scored: int = 0
    """Tokens of the prompt whose rows have scored what follows them."""
    pooling: Pooling | None = None
    """How its prompt becomes a vector; None: not at all."""
    drafting: Drafting | None = None
    """How its next tokens are guessed; None: not at all."""
    drafted: int = 0
    """Tokens of a draft that a step under way computes."""
    published: int = 0
    """Blocks that others may share, as far as this sequence has seen to it."""
    cached: int = 0
    """Tokens of the prompt that were in the cache already, out of other sequences."""
    blocks: list[int] = field(default_factory=list)
    window_blocks: list[int] = field(default_factory=list)
    """Of layers that attend to a window, from its block ``window_first`` on."""
    window_first: int = 0
    losses: int = 0
    """Times in a row that the ranks were lost in a step with this sequence in it (``suspects``)."""
    losses_in_all: int = 0
    output_at_loss: int = 0
    """Tokens of the output when that happened last."""
    alive: bool = True
    """False once finished or aborted."""
    slot: int = -1
    """Of the rank's sampler, while the sequence runs."""
    sampling_sent: bool = False
    """Whether the slot knows how to draw."""
    _keys: list[bytes] = field(default_factory=list)

    @property
    def is_fresh(self) -> bool:
        """Whether it has drawn nothing yet."""
        return len(self.output) == self.resumed

    @property
    def known(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def length(self) -> int:
        """With those that are being drawn."""
        return self.known + self.drawing

    @property
    def written(self) -> int:
        """Tokens whose keys and values are in the cache, whatever becomes of steps under way."""
        return self.computed - self.computing

    def rewind(self) -> None:
        """Steps under way are lost, and how it draws; its blocks hold what was written before."""
        self.computed = self.written
        self.computing = self.drawing = self.drafted = 0
        self.sampling_sent = False

    @property
    def to_prefill(self) -> int:
        """Tokens still to be computed before the sequence decodes; its newest output token
        aside."""
        left = self.length - self.computed
        return 0 if self.length > len(self.prompt) and left == 1 else left

    @property
    def scores(self) -> bool:
        """Whether tokens of the prompt are still to be scored."""
        return self.prompt_logprobs >= 0 and self.scored < len(self.prompt) - 1

    def may_skip(self, tokens: int) -> bool:
        """Whether so many of its first tokens need not be computed if others have been: nobody
        looks at more of them than their keys and values."""
        if self.pooling is not None and tokens > self.pooling.taken:
            return False
        return tokens <= self.scored or not self.scores

    def completes(self, token: int) -> bool:
        """Whether the newest token is one that nothing can follow in the sequence's grammar."""
        if self.matcher is None:
            return False
        self.matcher.take(token)
        return self.matcher.is_complete

    def draft(self, most: int) -> list[int]:
        """Tokens that may follow those that are known, at most so many."""
        if self.drafting is None:
            return []
        lookup = self.drafting.lookup
        lookup.extend(self.tokens(lookup.length, self.known))
        return self.drafting.draft(most)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens of prompt and output at positions [start, stop)."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : stop - split]
        return self.prompt[start:stop] + self.output[: max(0, stop - split)]

    def block_key(self, index: int, block_size: int) -> bytes:
        """What a whole block's keys and values depend on: its tokens and all before them; adapter
        and salt."""
        assert (index + 1) * block_size <= self.known, "a token of the block is still being drawn"
        while len(self._keys) <= index:
            start = len(self._keys) * block_size
            tokens = np.array(self.tokens(start, start + block_size), dtype=np.int32)
            before = self._keys[-1] if self._keys else self._root()
            self._keys.append(blake3(before + tokens.tobytes()).digest())
        return self._keys[index]

    def _root(self) -> bytes:
        """What the first block's key begins with. Derived, so that no salt can be made up that
        stands for another sequence's tokens."""
        root = b""
        if self.cache_salt:
            root = blake3(self.cache_salt.encode(), derive_key_context=_SALT_CONTEXT).digest()
        if self.adapter:
            named = root + self.adapter.to_bytes(4, "little")
            root = blake3(named, derive_key_context=_ADAPTER_CONTEXT).digest()
        return root
