"""Steps of which each request of a batch gets a token, and wants nothing of it but its text.

Between two steps the processor's caches belong to the model: a token costs the leader what it has
to touch for it, many times what there is to compute. So of such a step no more is done than to send
the next one out and its tokens on. What else has to be known of it is made up for many steps at
once (``settle``): before anything else happens to one of the requests, and after ``MOST`` steps.
"""

from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct
from typing import Final

import msgspec

from precast.rpc.step_tokens import StepTokens
from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.request import Request
from services.decode_worker.engine.response_buffer import Sink
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.speculation import Drafting
from services.decode_worker.metrics import Metrics
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.protocol import DecodeOn, StepDone, frame

MOST: Final = 256
"""Steps of a run."""
MOST_S: Final = 2.0
"""Of a run: what is made up at its end, metrics among it, is no later."""
LEAST: Final = 4
"""Steps that a run is worth beginning for."""
SHORT_S: Final = 0.012
"""Steps that are followed at once: about what the first token of another request waits longer."""


def is_short(expected_s: float) -> bool:
    """Whether a step that should take so long is to be followed at once."""
    return expected_s <= SHORT_S


_PAIR: Final = Struct("<ii")


@dataclass(frozen=True, kw_only=True)
class RunSteps:
    """What the steps of a run are like."""

    graph_size: int
    expected_s: float
    """How long each should take; 0: not known."""
    limit_s: float
    under_way: int
    """Those that were sent before."""


class PlainRun:
    """Steps of one batch; it begins with those under way that were sent before."""

    def __init__(
        self,
        requests: Many[Request],
        sink: Sink,
        blocks: BlockPool,
        like: RunSteps,
        steps: int,
        drafting: Many[tuple[int, Drafting]],
        settle: Callable[[Sequence], None],
        fail: Callable[[Request, Exception], None],
    ) -> None:
        """``sink``: of all of them, behind nothing that waits. ``steps``: that may be sent.
        ``drafting``: of those whose next tokens may be guessed, with their places. ``settle`` is
        told whose steps are over. ``fail`` ends a request whose text can't be made."""
        self._requests = requests
        self._blocks = blocks
        self._like = like
        self._sink: Final = sink
        self._texts_of = [one.detokenizer.push_plain for one in requests]
        self._ends = frozenset[int]().union(*(one.hidden_token_ids for one in requests))
        self._handles = [one.recipient.handle for one in requests]
        self._counts = [1] * len(requests)
        self._drafting = drafting
        self._settle = settle
        self._fail = fail
        self._left = steps
        self._due = _due([one.sequence for one in requests], blocks.block_size, steps)
        self._again: Final = frame(DecodeOn(graph_size=like.graph_size))
        """The command for a step in which nobody needs another block."""
        self.short: Final = is_short(like.expected_s)
        """Whether each step is to be followed at once."""
        self.sent = 0
        """Steps that were sent."""
        self.under_way = like.under_way
        """Steps that the ranks have not answered."""
        self._taken: list[tuple[list[int], int, float]] = []
        """Of each step that was taken in: its tokens, what it took the ranks (us), and when that
        was (monotonic)."""

    def take(
        self, done: StepDone, now: float, group: RankGroup | None, otherwise: Callable[[], None]
    ) -> bool:
        """Takes in what a step gave, sends the next one to ``group`` and the tokens on, in as few
        calls as there can be. False, with nothing done, where that is not so simple, or where the
        ranks have no other step. ``otherwise`` sees to what follows where there is no ``group``,
        and where the next step is another one."""
        tokens = done.token_ids
        if self.under_way < 2 or done.failed or not self._ends.isdisjoint(tokens):
            return False
        if len(tokens) != len(self._requests) or not self._sink.is_writable:
            return False
        self.under_way -= 1
        self._taken.append((tokens, done.step_us, now))
        if self._drafting and self._guesses(tokens):
            self._left = 0
        try:
            if group is None or not self.send_next(group):
                otherwise()
        finally:  # last, for whoever reads it may get the processor at once
            self._tell(tokens)
        return True

    def _tell(self, tokens: list[int]) -> None:
        """Sends on what a step gave."""
        texts: list[str] = []
        failed: dict[int, Exception] = {}
        for place, token in enumerate(tokens):
            try:
                texts.append(self._texts_of[place](token))
            except Exception as error:  # the others go on
                failed[place] = error
                texts.append("")
        columns = StepTokens(self._handles, self._counts, tokens, texts)
        self._sink.send_tokens(_without(columns, failed) if failed else columns)
        for place, why in failed.items():
            self._fail(self._requests[place], why)

    @property
    def taken(self) -> int:
        """Steps that were taken in."""
        return len(self._taken)

    @property
    def steps_us(self) -> list[int]:
        """What each of them took the ranks."""
        return [step_us for _, step_us, _ in self._taken]

    def send_next(self, group: RankGroup) -> bool:
        """The same batch once more; false: what else there may be has to be looked at."""
        if not self._left:
            return False
        places = self._due.get(self.sent)
        command = self._again if places is None else self._growing(places)
        if command is None:
            return False
        self._left -= 1
        self.sent += 1
        self.under_way += 1
        group.send_frames(command, self._like.limit_s)
        return True

    def settle(self, metrics: Metrics) -> None:
        """Requests and sequences are as if each step had been dealt with by itself."""
        taken = self.taken
        for place, request in enumerate(self._requests):
            sequence = request.sequence
            sequence.output += [tokens[place] for tokens, _, _ in self._taken]
            sequence.computed += self.sent
            sequence.computing += self.sent - taken
            sequence.drawing += self.sent - taken
            request.completion_tokens += taken
            self._settle(sequence)
        self._time(metrics)

    def _time(self, metrics: Metrics) -> None:
        told_s = [self._requests[0].told_s, *(now for _, _, now in self._taken)]
        gaps = [after - before for before, after in pairwise(told_s)]
        metrics.inter_token_seconds.of("").observe_all(gaps, len(self._requests))
        for request in self._requests:
            request.told_s = told_s[-1]

    def _guesses(self, tokens: list[int]) -> bool:
        """Whether anything can be guessed of what follows the token that is being drawn."""
        for place, drafting in self._drafting:
            drafting.lookup.extend([tokens[place]])
        return any(drafting.draft(2) for _, drafting in self._drafting)

    def _growing(self, places: list[int]) -> bytes | None:
        """The command for a step in which each of them gets a block. None if there are too few."""
        if len(places) > self._blocks.free_blocks:
            return None
        found = self._blocks.allocate(len(places))
        for place, block in zip(places, found, strict=True):
            self._requests[place].sequence.blocks.append(block)
        pairs = b"".join(map(_PAIR.pack, places, found))
        return frame(DecodeOn(blocks=pairs, graph_size=self._like.graph_size))


def _without(columns: StepTokens, places: Container[int]) -> StepTokens:
    kept = [place for place in range(len(columns.handles)) if place not in places]
    rows = msgspec.structs.astuple(columns)
    return StepTokens(*([column[place] for place in kept] for column in rows))


def _due(sequences: Many[Sequence], size: int, steps: int) -> Mapping[int, list[int]]:
    """In which of the next steps who needs another block: places by the number of the step."""
    due = dict[int, list[int]]()
    for place, sequence in enumerate(sequences):
        room = len(sequence.blocks) * size - sequence.computed
        for step in range(room, steps, size):
            due.setdefault(step, []).append(place)
    return due
