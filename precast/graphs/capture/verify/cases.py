"""Which steps a graph is verified and measured with, known before any of them runs: stand-in ranks
take part in the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from precast.graphs.capture.export import Span, verification_plan
from precast.models.layers import Shape

VERIFY_LAYERS: Final = 2
TIMED_LAYERS: Final = (2, 10)
"""What a layer takes is the difference of two models' steps: the embedding drops out."""
MAX_SEQUENCES: Final = 32
"""Most sequences of a case: beyond, tokens are those of prompts."""
TIMED_ROUNDS: Final = 20
TIMED_ROUNDS_OF_MANY: Final = 5
"""With more than MAX_SEQUENCES tokens, where a step takes long enough to be measured."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to compare with eager."""

    name: str
    spans: tuple[Span, ...]
    rows: tuple[int, ...] | None = None
    """Tokens whose logits are needed; None: all."""

    @property
    def tokens(self) -> int:
        return sum(span.new for span in self.spans)


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What stand-in ranks need to know of a step."""

    layers: int
    tokens: int
    """Rows that are reduced in each layer."""


def cases(tokens: int, block: int) -> list[Case]:
    """Decode steps with contexts alike, at the edges of blocks and mixed, and with padding; a
    prompt of its own, and a later chunk of one behind decoding sequences."""
    edges = [1, 2, block - 1, block, block + 1, 3 * block, 4 * block - 1]
    count = min(tokens, MAX_SEQUENCES)
    found = [
        _decode("contexts alike", [5] * count),
        _decode("block edges", [edges[row % len(edges)] for row in range(count)]),
        _decode("contexts mixed", [(row * 37) % (4 * block) + 1 for row in range(count)]),
        _decode("padded tokens", [7 + row for row in range(count // 2 + 1)]),
    ]
    if tokens > 1:
        prompt = Span(new=tokens, context=tokens)
        found.append(Case(name="prompt", spans=(prompt,), rows=(tokens - 1,)))
    if tokens > 3:
        beside = min(3, tokens // 4)
        chunk = tokens - beside - 1  # one token of padding
        spans = (
            *(Span(new=1, context=block + 1 + row) for row in range(beside)),
            Span(new=chunk, context=chunk + 7),
        )
        rows = (*range(beside), beside + chunk - 1)
        found.append(Case(name="decode beside a prompt", spans=spans, rows=rows))
        found.append(Case(name="a chunk without its end", spans=spans[-1:], rows=()))
    return found


def timed_spans(tokens: int, block: int) -> tuple[Span, ...]:
    """The step that is measured: decoding sequences of two blocks, or one prompt."""
    if tokens <= MAX_SEQUENCES:
        return (Span(new=1, context=2 * block),) * tokens
    return (Span(new=tokens, context=tokens),)


def timed_rounds(tokens: int) -> int:
    return TIMED_ROUNDS if tokens <= MAX_SEQUENCES else TIMED_ROUNDS_OF_MANY


def planned(shape: Shape, tokens: int, block: int) -> list[PlannedStep]:
    """All steps of a verification and a measurement in their order."""
    layers = len(verification_plan(shape, VERIFY_LAYERS))
    steps = []
    for case in cases(tokens, block):
        steps.append(PlannedStep(layers=layers, tokens=case.tokens))  # eager
        steps.append(PlannedStep(layers=layers, tokens=tokens))
    steps += [
        PlannedStep(layers=count, tokens=tokens)
        for _ in range(timed_rounds(tokens))
        for count in timed_layers(shape)
    ]
    return steps


def timed_layers(shape: Shape) -> Sequence[int]:
    """Layers of the models that are measured, all kinds among them."""
    fewest = len(verification_plan(shape, VERIFY_LAYERS))
    few, many = TIMED_LAYERS
    return (fewest, fewest * -(-many // few))


def _decode(name: str, contexts: Sequence[int]) -> Case:
    return Case(name=name, spans=tuple(Span(new=1, context=context) for context in contexts))
