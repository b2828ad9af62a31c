"""Messages between a decode worker's leader and its rank processes.

Each rank is a process with one Unix stream socket to the leader. A frame is a 4-byte little-endian
length and a msgpack body. The leader sends every command to every rank in the same order; ranks
work in lock step, and draw the same tokens. Only rank 0 answers ``Step``; every rank answers
``Init``, ``Join``, ``LoadGraph`` and ``Ping``, and says meanwhile how far it has come with an
``Init``. A rank that can't go on sends ``RankFailed`` and exits; a rank that dies closes its
socket. With ``Init`` comes the descriptor of the file in which the rank has its KV cache.
"""

import struct
from typing import Final

import msgspec

from precast.models.precision import Precision

FRAME_HEADER: Final = struct.Struct("<I")
HEADER_BYTES: Final = FRAME_HEADER.size
MAX_FRAME_BYTES: Final = 64 << 20
MAX_DIFFERENCE: Final = 1e9
LAST_DRAWN: Final = -1
"""In place of a token id: the one that was drawn last for the sequence's slot."""


class Init(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """First command: load the model's shard and allocate the KV cache."""

    model_dir: str
    packed_dir: str
    """Where packed weights are kept between starts."""
    precision: Precision
    tp_rank: int
    tp_size: int
    cores: tuple[int, ...]
    """For each compute thread, the CPU that it is pinned to, or -1."""
    cpus: tuple[int, ...] = ()
    """CPUs that the rank may run on, if not only on its threads' own; its memory is theirs."""
    kv_blocks: int
    window_blocks: int = 0
    """KV blocks of layers that attend to a window; 0: as many as the others have, and steps name
    none of their own for them."""
    block_size: int
    max_batch_size: int
    max_context_length: int
    group_id: str
    """Names the group's shared-memory segment: unique to this start of this group."""
    kernel_provider: str
    adapters: tuple[tuple[str, str, str], ...] = ()
    """Name, configuration and weights of each adapter, the same bytes at every start; steps name
    them by their places, from 1 on."""
    log_level: str = "info"
    log_format: str = "console"


class Loading(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """How far a rank has come with its weights, layer by layer; so often as it is true."""

    tp_rank: int
    done: int
    total: int


class Loaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Answer to ``Init``."""

    tp_rank: int


class Join(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """All ranks have loaded: meet in the group's shared memory."""


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Answer to ``Join``."""

    tp_rank: int
    load_s: float
    weight_bytes: int
    vocab_size: int
    kernels: dict[str, str]
    """Who serves each operator (``precast.ops.providers``)."""
    graph_factors: dict[str, str]
    """This rank's graph factors, the number of tokens left out (``precast.graphs.key``)."""
    content: str = ""
    """Of the model's files, as a digest; empty: not known."""


class LoadGraph(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Load a verified artifact and replay it for ``num_tokens`` from the next step on.

    Paths, keys and versions: one for each rank, since ranks' shard shapes may differ."""

    num_tokens: int
    paths: tuple[str, ...]
    keys: tuple[str, ...]
    versions: tuple[int, ...]
    trial: bool = False
    """To be tried beside the graph that serves, not in its place."""


class GraphLoaded(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    tp_rank: int
    num_tokens: int
    load_ms: float
    error: str | None = None
    """Set if the graph was refused; the rank goes on without it."""


class DropGraph(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Forget the graph or the trial graph of a size. Not answered."""

    num_tokens: int
    trial: bool = False


class StartSampling(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """How to draw the tokens of the sequence that has a slot, until another one gets it.

    Comes once, before the first step that draws for it: steps name the slot. A sequence that was
    preempted comes again, with what it had drawn. Not answered. Token ids are little-endian
    int32."""

    slot: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    logprobs: int
    """Alternatives to report; -1: no logprobs."""
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    prompt_token_ids: bytes
    """Filled only where there is a repetition penalty."""
    output_token_ids: bytes
    """Filled only where there is a penalty, or a banned sequence."""
    bias_token_ids: bytes
    bias_values: bytes
    """Little-endian float32."""
    min_tokens: int = 0
    """None of ``ending_token_ids`` is drawn before so many tokens."""
    ending_token_ids: bytes = b""
    banned_sequences: tuple[bytes, ...] = ()
    """Token ids of each: its last one is not drawn behind the others."""


class ScoredRows(msgspec.Struct, frozen=True, array_like=True):
    """Tokens whose log-probabilities are wanted, [R] each, little-endian int32."""

    rows: bytes
    """Of the step's tokens, that which each follows."""
    tokens: bytes
    tops: bytes
    """Alternatives to report."""


class PooledRows(msgspec.Struct, frozen=True, array_like=True):
    """Stretches of tokens whose hidden states are added up, [P] each, little-endian int32."""

    firsts: bytes
    """Of the step's tokens, each stretch's first."""
    counts: bytes


class Step(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One forward pass over S sequences with T new tokens in all: one each of those that decode,
    more of a prompt.

    Arrays are little-endian int32 bytes. ``context_lens[s]`` counts the tokens of sequence s in the
    cache once this step's are written. ``block_tables`` is [S, width], unused entries are 0."""

    step_id: int
    token_ids: bytes
    """[T]; ``LAST_DRAWN`` where a sequence decodes whose token the step before draws: this one is
    sent while that one runs. Such sequences have that one token."""
    positions: bytes
    slots: bytes
    """[T] flat cache slot of each new token: block * block_size + offset."""
    query_starts: bytes
    """[S + 1] prefix sums of new tokens."""
    context_lens: bytes
    block_tables: bytes
    block_table_width: int
    window_slots: bytes = b""
    """``slots`` of layers that attend to a window, where these have blocks of their own."""
    window_tables: bytes = b""
    """``block_tables`` likewise. Entries behind the window name blocks that may be another's: they
    are not read."""
    sampling_slots: bytes
    """[S] slot of how to draw (``StartSampling``); -1 in a step that was made up."""
    draws: bytes
    """[S] how many of each sequence's last tokens give another: 0 where its prompt goes on in a
    later step, more than 1 with a draft. Their sum is D."""
    drawn: bytes
    """[S] tokens of each sequence drawn so far: with its seed, what its first draw depends on; for
    each draw behind it there is one more."""
    masked: bytes = b""
    """Places, among the draws, of those whose tokens follow a grammar. ``Masks`` come before the
    next step, when the tokens before these draws are known; they are waited for."""
    adapters: bytes = b""
    """[S] each sequence's adapter, 0 for none; empty where there are none at all."""
    greedy: bool
    """Whether all that draw want the likeliest token as it stands, and nothing else: ranks then
    gather no logits."""
    scored: ScoredRows | None = None
    """Only in a step that runs eagerly: graphs give logits of few rows."""
    pooled: PooledRows | None = None
    """Likewise: graphs give no hidden states."""
    graph_size: int = 0
    """Captured size to replay, at least T; 0: run it eagerly."""
    shadow: bool = False
    """Run the trial graph of the captured size too, and compare (``shadow_trial.py``)."""
    goes_on: bool = False
    """Whether ``DecodeOn`` may follow: each sequence has one token, which gives another."""

    @property
    def shows_hidden(self) -> bool:
        """Whether it has to run eagerly."""
        return self.scored is not None or self.pooled is not None


class DecodeOn(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """The sequences of the last ``Step`` that goes on, in their order, by one token more: that
    which was drawn last for each."""

    blocks: bytes = b""
    """int32 [G, 2]: those that have got another block, by their place, and that block; it is behind
    those that they had."""
    window_blocks: bytes = b""
    """The same of layers that attend to a window."""
    graph_size: int = 0
    shadow: bool = False


class Masks(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Tokens that masked draws of a step may give. Not answered."""

    step_id: int
    rows: bytes
    """int32 [M] for each masked draw: its row in ``words``, -1 where the draw is for nothing."""
    words: bytes
    """int32 [masks, width], a bit for each token (``precast.ops.sampling``)."""
    width: int


class Logprobs(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class Shadow(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A trial graph beside the graph that serves, in one step."""

    difference: float
    """Largest difference of logits relative to the largest logit; ``MAX_DIFFERENCE``: no number."""
    current_us: float
    trial_us: float


class StepDone(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True, gc=False):
    token_ids: list[int]
    """[D]; -1 where none could be drawn."""
    logprobs: tuple[Logprobs | None, ...] = ()
    """[D], or empty when no sequence asked for them."""
    step_us: int
    failed: dict[int, int] = {}
    """Why there is no token (``precast.ops.draw_status``), by its place in ``token_ids``."""
    scores: tuple[Logprobs | None, ...] = ()
    """[R] of the tokens that were to be scored; None where logits are no numbers."""
    pooled: bytes = b""
    """float64 [P, H] sums of the hidden states behind the last norm."""
    shadow: Shadow | None = None


class RankFailed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    tp_rank: int
    message: str
    refused: bool = False
    """Whether the same command would fail again: of a model or a setting, not of the moment."""


class Ping(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Answered by every rank: it is there, and waits for a command."""


class Pong(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    tp_rank: int


class Shutdown(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


Command = (
    Init | Join | LoadGraph | DropGraph | StartSampling | Step | DecodeOn | Masks | Ping | Shutdown
)
Reply = Loading | Loaded | Ready | GraphLoaded | StepDone | Pong | RankFailed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def frame(message: Command | Reply) -> bytes:
    """A message with its length in front, ready for the socket."""
    body = encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return FRAME_HEADER.pack(len(body)) + body
